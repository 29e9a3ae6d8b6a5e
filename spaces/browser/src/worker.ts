/** Runs models beside the page, which stays free for the user meanwhile. Ended from outside, it gives all memory back. */

import type { PrepareRequest, RunRequest, WorkerMessage } from './messages';
import { LARGE, type Model, ModelFileError, loadModel } from './models';
import { type Graphs, inpaint, useFewSteps } from './pipeline';
import { type Device, hasWebGpu, openGraphs, threadCount } from './runtime';

let opened: { url: string; device: Device; graphs: Promise<Graphs> } | null = null;

function say(message: WorkerMessage, transfer: Transferable[] = []): void {
  self.postMessage(message, { transfer });
}

function open(model: Model, device: Device): Promise<Graphs> {
  if (opened?.url === model.url && opened.device === device) return opened.graphs;
  let loaded = 0;
  const graphs = openGraphs(model, device, (count) => {
    loaded += count;
    say({ kind: 'loading', loaded, size: model.size });
  });
  opened = { url: model.url, device, graphs };
  graphs.catch(() => {
    if (opened?.graphs === graphs) opened = null; // the next one tries again
  });
  return graphs;
}

async function chooseDevice(model: Model, device: Device | 'auto'): Promise<Device> {
  if (device !== 'auto') return device;
  return model.size > LARGE && (await hasWebGpu()) ? 'webgpu' : 'wasm';
}

/** Opens a model while the user is still painting. What goes wrong is told when it is to run. */
async function prepare({ modelUrl, device }: PrepareRequest): Promise<void> {
  try {
    const model = await loadModel(modelUrl);
    if (model.size <= LARGE) await open(model, await chooseDevice(model, device));
  } catch (error) {
    console.warn(String(error));
  }
}

async function run(request: RunRequest, model: Model, device: Device): Promise<void> {
  const graphs = await open(model, device);
  say({ kind: 'starting', device, threads: threadCount() });
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

self.onmessage = async ({ data: request }: MessageEvent<PrepareRequest | RunRequest>) => {
  if (request.kind === 'prepare') return prepare(request);
  const start = performance.now();
  let where: 'model' | 'run' = 'model';
  try {
    const model = await loadModel(request.modelUrl);
    where = 'run';
    const device = await chooseDevice(model, request.device);
    try {
      await run(request, model, device);
    } catch (error) {
      if (device === 'wasm' || error instanceof ModelFileError) throw error;
      say({ kind: 'fallback', reason: String(error) });
      opened = null;
      await run(request, model, 'wasm');
    }
    say({ kind: 'finished', seconds: (performance.now() - start) / 1000 });
  } catch (error) {
    const what = error instanceof ModelFileError ? 'file' : where;
    say({ kind: 'failed', what, detail: error instanceof Error ? error.message : String(error) });
  }
};
