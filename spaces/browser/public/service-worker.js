// Keeps the page itself, so that a second visit needs no network. Models are kept by the page (src/models.ts).
const CACHE = 'moebius-page-__VERSION__';

self.addEventListener('install', (event) => {
  event.waitUntil(
    caches
      .open(CACHE)
      .then((cache) => cache.addAll(__FILES__))
      .then(() => self.skipWaiting()),
  );
});

self.addEventListener('activate', (event) => {
  event.waitUntil(
    caches
      .keys()
      .then((names) => names.filter((name) => name.startsWith('moebius-page-') && name !== CACHE))
      .then((names) => Promise.all(names.map((name) => caches.delete(name))))
      .then(() => self.clients.claim()),
  );
});

self.addEventListener('fetch', (event) => {
  const { request } = event;
  const scope = new URL(self.registration.scope);
  const url = new URL(request.url);
  if (request.method !== 'GET' || url.origin !== scope.origin || url.pathname.includes('/models/')) return;
  event.respondWith(
    caches.open(CACHE).then(async (cache) => {
      const kept = await cache.match(request, { ignoreSearch: request.mode === 'navigate' });
      // The list of models may be changed at any time; all else changes with the name of this cache.
      const isList = url.pathname.endsWith('/models.json');
      if (kept && !isList) return kept;
      const response = await fetch(request).catch((error) => kept ?? Promise.reject(error));
      if (response.ok && (isList || url.pathname.includes('/assets/'))) await cache.put(request, response.clone());
      return response;
    }),
  );
});
