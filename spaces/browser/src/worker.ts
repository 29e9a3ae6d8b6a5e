/** Runs models beside the page, which stays free for the user meanwhile. Ended from outside, it gives all memory back. */

import type { RunRequest, WorkerMessage } from './messages';
import { type Model, ModelFileError, loadModel } from './models';
import { type Graphs, inpaint, useFewSteps } from './pipeline';
import { type Device, hasWebGpu, openGraphs, threadCount } from './runtime';

/** Larger models are worth the larger runtime that WebGPU needs. */
const LARGE = 100 * 2 ** 20;

let opened: { url: string; device: Device; model: Model; graphs: Graphs } | null = null;

function say(message: WorkerMessage, transfer: Transferable[] = []): void {
  self.postMessage(message, { transfer });
}

async function open(url: string, device: Device): Promise<NonNullable<typeof opened>> {
  if (opened?.url === url && opened.device === device) return opened;
  const model = await loadModel(url);
  let loaded = 0;
  const graphs = await openGraphs(model, device, (count) => {
    loaded += count;
    say({ kind: 'loading', loaded, size: model.size });
  });
  say({ kind: 'starting', device, threads: threadCount() });
  opened = { url, device, model, graphs };
  return opened;
}

async function run(request: RunRequest, device: Device): Promise<void> {
  const { model, graphs } = await open(request.modelUrl, device);
  const config = request.fast ? useFewSteps(model.config) : model.config;
  const { defaults } = config;
  for (const [candidate, seed] of request.seeds.entries()) {
    const settings = {
      ...defaults,
      steps: request.steps ?? defaults.steps,
      guidanceScale: request.guidanceScale ?? defaults.guidanceScale,
      detail: request.detail === 'auto' ? defaults.detail : request.detail,
      margin: request.margin,
      seed,
    };
    const candidates = request.seeds.length;
    const patch = await inpaint(
      graphs,
      config,
      request.pixels,
      request.mask,
      settings,
      (done, total) => say({ kind: 'step', candidate, candidates, done, total }),
      (share) => say({ kind: 'detail', candidate, candidates, share }),
    );
    say({ kind: 'patch', patch, seed }, [patch.pixels.buffer]);
  }
}

self.onmessage = async ({ data: request }: MessageEvent<RunRequest>) => {
  const start = performance.now();
  let where: 'model' | 'run' = 'model';
  try {
    const { size } = await loadModel(request.modelUrl);
    where = 'run';
    let { device } = request;
    if (device === 'auto') device = size > LARGE && (await hasWebGpu()) ? 'webgpu' : 'wasm';
    try {
      await run(request, device);
    } catch (error) {
      if (device === 'wasm' || error instanceof ModelFileError) throw error;
      say({ kind: 'fallback', reason: String(error) });
      opened = null;
      await run(request, 'wasm');
    }
    say({ kind: 'finished', seconds: (performance.now() - start) / 1000 });
  } catch (error) {
    const what = error instanceof ModelFileError ? 'file' : where;
    say({ kind: 'failed', what, detail: error instanceof Error ? error.message : String(error) });
  }
};
