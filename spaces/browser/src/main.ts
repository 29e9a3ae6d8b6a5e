/** The page: its controls, and what they ask of the editor and of the worker. */

import { Editor, makeCanvas } from './editor';
import { drawExample } from './example';
import type { PrepareRequest, RunRequest, WorkerMessage } from './messages';
import { LARGE, keepModels, loadModel, modelUrl } from './models';
import type { Patch } from './pipeline';
import { LANGUAGES, type TextKey, preferredLanguage, setLanguage, text } from './text';

const find = <T extends HTMLElement = HTMLElement>(id: string) => document.getElementById(id) as T;
const input = (id: string) => find<HTMLInputElement>(id);
const MIN_SIDE = 16;
const MEGABYTE = 1e6;
/** A large model gives its memory back after every run, a smaller one after a while. */
const IDLE = 60_000; // ms

let worker: Worker | null = null;
let idle: ReturnType<typeof setTimeout> | undefined;
let patches: Patch[] = [];
let name = 'photo';
let shown: { key: TextKey; values: Record<string, string | number> } | null = null;

const editor = new Editor(find<HTMLCanvasElement>('canvas'), () => {
  input('undo').disabled = input('clear').disabled = !editor.hasMarks();
});

function tell(key: TextKey, values: Record<string, string | number> = {}): void {
  shown = { key, values };
  find('status').textContent = text(key, values);
}

// The photo

function openCanvas(canvas: HTMLCanvasElement, title: string): void {
  if (Math.min(canvas.width, canvas.height) < MIN_SIDE) return tell('tooSmall');
  name = title;
  showWork(true);
  find('canvas').style.setProperty('--aspect', String(canvas.height / canvas.width));
  editor.open(canvas);
  forgetResults();
  tell('sizeOfPhoto', { width: canvas.width, height: canvas.height });
  prepare();
}

async function openFile(file: Blob & { name?: string }): Promise<void> {
  stop();
  try {
    const bitmap = await createImageBitmap(file, { imageOrientation: 'from-image' });
    const [canvas, context] = makeCanvas(bitmap.width, bitmap.height);
    context.drawImage(bitmap, 0, 0);
    bitmap.close();
    openCanvas(canvas, file.name?.replace(/\.\w+$/, '') || 'photo');
  } catch {
    tell('noPhoto');
  }
}

function showWork(isOpen: boolean): void {
  find('open').hidden = isOpen;
  find('work').hidden = !isOpen;
}

// Results

function forgetResults(): void {
  patches = [];
  find('results').hidden = true;
  find('marking').hidden = false;
  find('candidates').querySelectorAll('label').forEach((label) => label.remove());
  editor.show(null);
}

function addResult(patch: Patch): void {
  const number = patches.push(patch);
  const label = document.createElement('label');
  const radio = document.createElement('input');
  radio.type = 'radio';
  radio.name = 'candidate';
  radio.addEventListener('change', () => editor.show(patch));
  label.append(radio, text('candidate', { number }));
  find('candidates').append(label);
  find('candidates').hidden = number < 2;
  find('results').hidden = false;
  find('marking').hidden = true;
  if (number === 1) {
    radio.checked = true;
    input('compare').value = '0';
    editor.compare(0);
    editor.show(patch);
  }
}

async function save(canvas: HTMLCanvasElement, file: string, type = 'image/png'): Promise<void> {
  const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, type, 0.95));
  if (!blob) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// Runs

function chosenModel(): string {
  const choice = input('model').value;
  return modelUrl(choice === '' ? input('other').value.trim() : choice, document.baseURI);
}

function chosenDevice(): RunRequest['device'] {
  return input('device').value as RunRequest['device'];
}

function setRunning(isRunning: boolean): void {
  find('run').hidden = isRunning;
  find('stop').hidden = !isRunning;
  find('progress').hidden = !isRunning;
}

function startWorker(): Worker {
  clearTimeout(idle);
  return (worker ??= new Worker(new URL('./worker.ts', import.meta.url), { type: 'module' }));
}

function endWorker(): void {
  worker?.terminate();
  worker = null;
}

/** Opens the model while the user paints. */
function prepare(): void {
  if (find('work').hidden || !find('stop').hidden || (!input('model').value && !input('other').value)) return;
  const request: PrepareRequest = { kind: 'prepare', modelUrl: chosenModel(), device: chosenDevice() };
  startWorker().postMessage(request);
}

function stop(): void {
  if (find('stop').hidden) return;
  endWorker(); // at once, whatever it computes; this also gives its memory back
  setRunning(false);
  tell('stopped');
}

let maskReading: Promise<void> = Promise.resolve(); // that of a large photo takes a while

async function run(): Promise<void> {
  await maskReading;
  const mask = editor.readMask();
  if (!mask.data.includes(1)) return tell('nothingMarked');
  const worker = startWorker();
  keepModels();
  forgetResults();
  setRunning(true);
  find('stop').focus();
  let size = 0;
  const progress = find<HTMLProgressElement>('progress');
  progress.value = 0;
  const end = (key: TextKey, values: Record<string, string | number>) => {
    setRunning(false);
    find(patches.length ? 'png' : 'run').focus();
    tell(key, values);
    if (size > LARGE) endWorker();
    else idle = setTimeout(endWorker, IDLE);
  };
  worker.onerror = (event) => {
    endWorker();
    end('failedRun', { detail: event.message ?? '' });
  };
  worker.onmessage = ({ data: message }: MessageEvent<WorkerMessage>) => {
    switch (message.kind) {
      case 'loading':
        size = message.size;
        progress.value = message.loaded / message.size;
        tell('loading', {
          loaded: Math.round(message.loaded / MEGABYTE),
          size: Math.round(message.size / MEGABYTE),
        });
        break;
      case 'starting':
        progress.removeAttribute('value');
        tell('starting', { device: message.device === 'webgpu' ? 'WebGPU' : 'WebAssembly', threads: message.threads });
        break;
      case 'fallback':
        console.warn(message.reason);
        tell('fallback');
        break;
      case 'step': {
        const { candidate, candidates, done, total } = message;
        progress.value = (candidate + done / total) / candidates;
        tell('step', { candidate: candidate + 1, candidates, done, total });
        break;
      }
      case 'detail': {
        const { candidate, candidates, share } = message;
        progress.value = share;
        tell('stepDetail', { candidate: candidate + 1, candidates, percent: Math.round(100 * share) });
        break;
      }
      case 'patch':
        addResult(message.patch);
        break;
      case 'finished':
        end('finished', { seconds: message.seconds.toFixed(1) });
        break;
      case 'failed':
        endWorker();
        end(({ file: 'failedFile', model: 'failedModel', run: 'failedRun' } as const)[message.what], {
          detail: message.detail,
        });
    }
  };
  const seed = input('seed').valueAsNumber || 0;
  const number = (id: string) => (Number.isFinite(input(id).valueAsNumber) ? input(id).valueAsNumber : null);
  const count = Math.min(Math.max(number('count') ?? 1, 1), 8);
  const request: RunRequest = {
    kind: 'run',
    modelUrl: chosenModel(),
    pixels: editor.pixels(),
    mask,
    steps: number('steps'),
    guidanceScale: number('guidance'),
    detail: input('detail').value === 'none' ? null : (input('detail').value as 'auto' | 'patches'),
    margin: Math.max(number('context') ?? 64, 0),
    seeds: Array.from({ length: count }, (_, i) => (seed + i) >>> 0),
    fast: input('fast').checked,
    device: chosenDevice(),
  };
  worker.postMessage(request, [request.pixels.buffer, request.mask.data.buffer]);
}

// Controls

function setTool(isErasing: boolean): void {
  editor.isErasing = isErasing;
  find('brush').setAttribute('aria-pressed', String(!isErasing));
  find('eraser').setAttribute('aria-pressed', String(isErasing));
}

async function showModelSize(): Promise<void> {
  find('other-label').hidden = input('model').value !== '';
  find('model-size').textContent = '';
  if (!input('model').value && !input('other').value) return;
  const url = chosenModel();
  const model = await loadModel(url).catch(() => null);
  if (model && url === chosenModel())
    find('model-size').textContent = text('modelSize', { size: Math.round(model.size / MEGABYTE) });
}

async function listModels(): Promise<void> {
  const models: { name: string; url: string }[] = await (await fetch('models.json')).json();
  const wanted = new URLSearchParams(location.search).get('model');
  const select = find<HTMLSelectElement>('model');
  select.replaceChildren(...models.map(({ name, url }) => new Option(name, url)), new Option(text('other'), ''));
  if (wanted) {
    select.value = models.find((model) => model.name === wanted)?.url ?? '';
    if (select.value === '') input('other').value = wanted;
  }
}

async function start(): Promise<void> {
  const languages = find<HTMLSelectElement>('language');
  languages.append(...Object.entries(LANGUAGES).map(([code, name]) => new Option(name, code)));
  languages.value = preferredLanguage();
  await setLanguage(languages.value);
  languages.addEventListener('change', async () => {
    localStorage.setItem('language', languages.value);
    await setLanguage(languages.value);
    await listModels();
    if (shown) tell(shown.key, shown.values);
  });

  const onFile = (id: string, act: (file: File) => void) =>
    input(id).addEventListener('change', () => {
      const file = input(id).files?.[0];
      input(id).value = '';
      if (file) act(file);
    });
  onFile('photo', openFile);
  onFile('mask', (file) => {
    maskReading = createImageBitmap(file).then(
      (bitmap) => (editor.importMask(bitmap) ? forgetResults() : tell('maskSize')),
      () => tell('noPhoto'),
    );
  });
  document.addEventListener('paste', (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith('image/'));
    if (file) openFile(file);
  });
  for (const kind of ['dragover', 'dragleave', 'drop'])
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle('dropping', kind === 'dragover');
      const file = (event as DragEvent).dataTransfer?.files[0];
      if (kind === 'drop' && file) openFile(file);
    });

  const click = (id: string, act: () => void) => find(id).addEventListener('click', act);
  click('example', () => openCanvas(drawExample(), 'example'));
  click('brush', () => setTool(false));
  click('eraser', () => setTool(true));
  click('undo', () => editor.undo());
  click('clear', () => editor.clear());
  click('zoom-in', () => editor.zoom(1.25));
  click('zoom-out', () => editor.zoom(0.8));
  click('fit', () => editor.fit());
  click('run', run);
  click('stop', stop);
  click('save-mask', () => save(editor.drawMask(), `${name}-mask.png`));
  click('png', () => save(editor.compose(), `${name}-filled.png`));
  click('jpeg', () => save(editor.compose(), `${name}-filled.jpg`, 'image/jpeg'));
  click('edit', () => {
    forgetResults();
    find('canvas').focus();
    prepare();
  });
  click('keep', () => openCanvas(editor.compose(), name));
  click('close', () => {
    stop();
    endWorker();
    editor.close();
    forgetResults();
    showWork(false);
    find('status').textContent = '';
    input('photo').focus();
  });
  input('size').addEventListener('input', () => (editor.size = input('size').valueAsNumber));
  input('compare').addEventListener('input', () => editor.compare(input('compare').valueAsNumber / 100));
  find('canvas').addEventListener('tool', () => {
    setTool(editor.isErasing);
    input('size').value = String(editor.size);
  });
  for (const id of ['model', 'other']) input(id).addEventListener('change', showModelSize);
  for (const id of ['model', 'other', 'device'])
    input(id).addEventListener('change', () => {
      if (find('stop').hidden) endWorker(); // else two models would be in memory
      prepare();
    });

  if (import.meta.env.PROD) navigator.serviceWorker?.register('./service-worker.js').catch(console.warn);
  await listModels();
  await showModelSize();
  document.body.dataset.ready = 'true';
}

start();
