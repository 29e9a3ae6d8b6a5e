/** Exported models: what is in their folders, loaded once and kept by the browser. */

import type { DetailMode } from './detail';
import type { ModelConfig } from './pipeline';
import type { PasteMode } from './paste';

const CACHE = 'moebius-models';
const PART = 8 * 2 ** 20; // bytes of a part; a download that breaks off goes on with the next one

/** Bytes from which a model is large: worth WebGPU's larger runtime, and only in memory while it runs. */
export const LARGE = 100 * 2 ** 20;

export interface Model {
  url: string;
  config: ModelConfig;
  /** Bytes of all files. */
  size: number;
  files: Record<string, { size: number; sha256: string }>;
}

/** The address of a model's folder: in the page's `models`, elsewhere, or a repository on the hub. */
export function modelUrl(name: string, base: string): string {
  const isRepository = /^[\w-][\w.-]*\/[\w.-]+$/.test(name) && !name.startsWith('models/');
  const place = isRepository ? `https://huggingface.co/${name}/resolve/main/` : name;
  return new URL(place.endsWith('/') ? place : `${place}/`, base).href;
}

/** A small file: the server's if it answers, else the one that was kept. */
async function loadJson(url: string): Promise<any> {
  const cache = await caches.open(CACHE);
  let response: Response | undefined;
  try {
    response = await fetch(url, { cache: 'no-cache' });
  } catch {
    response = undefined;
  }
  if (response?.ok) await cache.put(url, response.clone());
  else response = (await cache.match(url)) ?? response;
  if (!response?.ok) throw new Error(`${url}: ${response ? response.status : 'offline'}`);
  return response.json();
}

export async function loadModel(url: string): Promise<Model> {
  const [index, scheduler, unet, vae, files] = await Promise.all(
    ['model_index', 'scheduler/scheduler_config', 'unet/config', 'vae_encoder/config', 'files'].map((name) =>
      loadJson(new URL(`${name}.json`, url).href),
    ),
  );
  const factor: number = index.vae_scale_factor;
  const config: ModelConfig = {
    scheduler,
    latentChannels: unet.out_channels,
    nativeSize: unet.sample_size * factor,
    factor,
    multiple: factor * 2 ** (unet.block_out_channels.length - 1),
    scalingFactor: vae.scaling_factor ?? 1,
    shiftFactor: vae.shift_factor ?? 0,
    defaults: {
      steps: index.default_num_inference_steps ?? 20,
      strength: index.default_strength ?? 0.99,
      guidanceScale: index.default_guidance_scale ?? 2.5,
      guidanceStart: index.default_guidance_start ?? 0,
      detail: (index.default_detail === undefined ? 'enlarged' : index.default_detail) as DetailMode,
      paste: (index.default_paste === 'seamless' ? 'seamless' : 'exact') as PasteMode,
    },
  };
  const size = Object.values(files as Model['files']).reduce((sum, file) => sum + file.size, 0);
  return { url, config, size, files };
}

/** Asks the browser not to make room by dropping the models; only pages can, workers cannot. */
export async function keepModels(): Promise<void> {
  await navigator.storage?.persist?.().catch(() => false);
}

async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string | null> {
  if (!crypto.subtle) return null; // on plain http to another machine
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/**
 * The bytes of a file, from the cache or the network. Parts are kept as they come, so that a download goes on where it
 * broke off; `onBytes` is told how many more there are.
 */
export async function loadFile(
  model: Model,
  file: string,
  onBytes: (count: number) => void,
): Promise<Uint8Array<ArrayBuffer>> {
  const { size, sha256: expected } = model.files[file];
  // The address is the stable one, whatever it redirects to, and changes with the content.
  const address = `${new URL(file, model.url).href}?${expected.slice(0, 16)}`;
  const cache = await caches.open(CACHE);
  const parts = Array.from({ length: Math.ceil(size / PART) }, (_, i) => `${address}&part=${i}`);
  const bytes = new Uint8Array(size);
  let isWhole = false;
  for (const [i, part] of parts.entries()) {
    const start = i * PART;
    const kept = await cache.match(part);
    if (kept) {
      const content = new Uint8Array(await kept.arrayBuffer());
      bytes.set(content.subarray(0, size - start), start);
      onBytes(content.length);
      continue;
    }
    if (isWhole) {
      await cache.put(part, new Response(bytes.slice(start, start + PART)));
      continue;
    }
    const end = Math.min(start + PART, size);
    const response = await fetch(new URL(file, model.url), { headers: { Range: `bytes=${start}-${end - 1}` } });
    if (!response.ok || !response.body) throw new Error(`${response.url}: ${response.status}`);
    // A server that knows no ranges sends everything at once.
    isWhole = response.status === 200;
    let position = isWhole ? 0 : start;
    let counted = start;
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      if (position + value.length > size) throw new ModelFileError(file);
      bytes.set(value, position);
      position += value.length;
      if (position > counted) {
        onBytes(position - counted);
        counted = position;
      }
    }
    if (position !== (isWhole ? size : end)) throw new ModelFileError(file);
    await cache.put(part, new Response(bytes.slice(start, end)));
  }
  const digest = await sha256(bytes);
  if (digest !== null && digest !== expected) {
    await Promise.all(parts.map((part) => cache.delete(part)));
    throw new ModelFileError(file);
  }
  return bytes;
}

/** A file of a model is not what the model says it is. */
export class ModelFileError extends Error {
  constructor(readonly file: string) {
    super(file);
    this.name = 'ModelFileError';
  }
}
