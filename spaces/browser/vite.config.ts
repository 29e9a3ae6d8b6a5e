import { createHash } from 'node:crypto';
import { readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { type Plugin, defineConfig } from 'vite';

/** Compresses the runtimes, since simple servers do not, and tells the service worker what the page consists of. */
function packPage(): Plugin {
  let folder = '';
  return {
    name: 'pack-page',
    apply: 'build',
    configResolved(config) {
      folder = join(config.root, config.build.outDir);
      if (config.build.outDir.startsWith('/')) folder = config.build.outDir;
    },
    closeBundle() {
      const assets = readdirSync(join(folder, 'assets'));
      for (const name of assets.filter((name) => name.endsWith('.wasm'))) {
        const path = join(folder, 'assets', name);
        writeFileSync(`${path}.gz`, gzipSync(readFileSync(path), { level: 9 }));
        rmSync(path);
      }
      // The runtime for WebGPU is kept once it has been used; not everybody needs it.
      const files = readdirSync(join(folder, 'assets'))
        .filter((name) => !name.includes('asyncify'))
        .map((name) => `./assets/${name}`);
      files.push('./', './index.html', './models.json', './icon.svg');
      const digest = createHash('sha256').update(readFileSync(join(folder, 'index.html')));
      for (const name of files) digest.update(name);
      const path = join(folder, 'service-worker.js');
      const source = readFileSync(path, 'utf8');
      writeFileSync(
        path,
        source.replace('__FILES__', JSON.stringify(files)).replace('__VERSION__', digest.digest('hex').slice(0, 12)),
      );
    },
  };
}

export default defineConfig({
  base: './',
  // The runtimes are files of the page and not part of its scripts.
  resolve: { conditions: ['onnxruntime-web-use-extern-wasm', 'module', 'browser'] },
  build: { target: 'es2022', chunkSizeWarningLimit: 1000 },
  worker: { format: 'es' },
  plugins: [packPage()],
});
