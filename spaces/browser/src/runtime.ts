/** ONNX Runtime for the browser, on the processor or on the graphics card. */

import type * as Ort from 'onnxruntime-web';
import asyncifyScript from 'onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url';
import asyncifyBinary from 'onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url';
import wasmScript from 'onnxruntime-web/ort-wasm-simd-threaded.mjs?url';
import wasmBinary from 'onnxruntime-web/ort-wasm-simd-threaded.wasm?url';
import { LARGE, type Model, loadFile } from './models';
import type { Graphs } from './pipeline';
import type { Planes } from './region';

/** A product of two matrices, `c = MatMul(a, b)`, as ONNX writes it. */
const PRODUCT =
  'CAg6SQoRCgFhCgFiEgFjIgZNYXRNdWwSAWdaDwoBYRIKCggIARIECgAKAFoPCgFiEgoKCAgBEgQKAAoAYg8KAWMSCgoICAESBAoACgBCBAoAEA0=';

export type Device = 'wasm' | 'webgpu';

/** Threads need an isolated page (two headers of its server). */
export function threadCount(): number {
  return self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
}

export async function hasWebGpu(): Promise<boolean> {
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<unknown> } }).gpu;
  return (await gpu?.requestAdapter().catch(() => null)) != null;
}

async function loadBinary(url: string): Promise<ArrayBuffer> {
  if (import.meta.env.DEV) return (await fetch(url)).arrayBuffer();
  const response = await fetch(`${url}.gz`);
  if (!response.ok || !response.body) throw new Error(`${response.url}: ${response.status}`);
  const bytes = await response.arrayBuffer();
  const isPacked = new Uint8Array(bytes)[0] === 0x1f; // some servers unpack such files on the way
  if (!isPacked) return bytes;
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer();
}

async function loadRuntime(device: Device): Promise<typeof Ort> {
  const isGpu = device === 'webgpu';
  const ort = (await (isGpu ? import('onnxruntime-web/webgpu') : import('onnxruntime-web/wasm'))) as typeof Ort;
  ort.env.wasm.wasmPaths = { mjs: new URL(isGpu ? asyncifyScript : wasmScript, import.meta.url).href };
  ort.env.wasm.wasmBinary = await loadBinary(new URL(isGpu ? asyncifyBinary : wasmBinary, import.meta.url).href);
  ort.env.wasm.numThreads = threadCount();
  ort.env.logLevel = 'error';
  return ort;
}

/** Opens the graphs of a model on a device. */
export async function openGraphs(model: Model, device: Device, onBytes: (count: number) => void): Promise<Graphs> {
  const ort = await loadRuntime(device);
  const options: Ort.InferenceSession.SessionOptions = { executionProviders: [device] };
  if (device === 'wasm' && model.size > LARGE) {
    // Weights of float16 stay so, and are float32 only for the layer that runs: half the memory for 6 % more time.
    options.graphOptimizationLevel = 'basic';
    options.extra = { optimization: { disable_specified_optimizers: 'ConstantFolding' } };
  }
  const open = async (name: 'unet' | 'vae_encoder' | 'vae_decoder') => {
    const graph = await loadFile(model, `${name}/model.onnx`, onBytes);
    const weights = `${name}/model.onnx_data`;
    if (!(weights in model.files)) return ort.InferenceSession.create(graph, options);
    const data = await loadFile(model, weights, onBytes);
    const externalData = [{ path: 'model.onnx_data', data }];
    const session = await ort.InferenceSession.create(graph, { ...options, externalData });
    // The runtime has them now. They are given back at once: the collector may take its time.
    structuredClone(data.buffer, { transfer: [data.buffer] });
    return session;
  };
  const encoder = await open('vae_encoder');
  const decoder = await open('vae_decoder');
  const unet = await open('unet');
  const bytes = Uint8Array.from(atob(PRODUCT), (character) => character.charCodeAt(0));
  const product = await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] });

  const tensor = ({ data, channels, height, width }: Planes) =>
    new ort.Tensor('float32', data, [1, channels, height, width]);
  const run = async (session: Ort.InferenceSession, feeds: Record<string, Ort.Tensor>) => {
    const output = (await session.run(feeds))[session.outputNames[0]];
    const [, channels, height, width] = output.dims;
    // A copy, since the tensor's memory belongs to the runtime.
    const result = { data: Float32Array.from((await output.getData()) as Float32Array), channels, height, width };
    output.dispose();
    return result;
  };
  return {
    encode: (image) => run(encoder, { sample: tensor(image) }),
    decode: (latents) => run(decoder, { latent_sample: tensor(latents) }),
    async predict(sample, timestep, categories) {
      const predictions: Float32Array[] = [];
      for (const category of categories) {
        const result = await run(unet, {
          sample: tensor(sample),
          timestep: new ort.Tensor('float32', Float32Array.of(timestep), [1]),
          encoder_hidden_states: new ort.Tensor('float32', Float32Array.of(category), [1, 1, 1]),
        });
        predictions.push(result.data);
      }
      return predictions;
    },
    async multiply(a, b, { rows, inner, columns }) {
      const left = new ort.Tensor('float32', a, [rows, inner]);
      const right = new ort.Tensor('float32', b, [inner, columns]);
      return (await product.run({ a: left, b: right })).c.data as Float32Array;
    },
  };
}
