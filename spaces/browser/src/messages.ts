/** What the page and its worker say to each other. */

import type { DetailMode } from './detail';
import type { Mask } from './region';
import type { Patch } from './pipeline';

interface ModelRequest {
  modelUrl: string;
  /** `auto` is WebGPU for large models where the browser has it. */
  device: 'auto' | 'wasm' | 'webgpu';
}

/** To be ready once there is something to run; large models wait until then. */
export interface PrepareRequest extends ModelRequest {
  kind: 'prepare';
}

export interface RunRequest extends ModelRequest {
  kind: 'run';
  pixels: Uint8ClampedArray<ArrayBuffer>;
  mask: Mask;
  /** Empty fields are the model's own. */
  steps: number | null;
  guidanceScale: number | null;
  detail: DetailMode | 'auto';
  margin: number;
  seeds: number[];
  fast: boolean;
}

export type WorkerMessage =
  | { kind: 'loading'; loaded: number; size: number }
  | { kind: 'starting'; device: 'wasm' | 'webgpu'; threads: number }
  | { kind: 'fallback'; reason: string }
  | { kind: 'step'; candidate: number; candidates: number; done: number; total: number }
  | { kind: 'detail'; candidate: number; candidates: number; share: number }
  | { kind: 'patch'; patch: Patch; seed: number }
  | { kind: 'finished'; seconds: number }
  | { kind: 'failed'; what: 'file' | 'model' | 'run'; detail: string };
