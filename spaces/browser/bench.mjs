// Measures an exported model in the browser's WebAssembly runtime, with one thread, outside of a browser:
//
//     node bench.mjs FOLDER 512x512 [GRAPH,...] [RUNS]
//
// Seconds are processor time, which other programs on the machine do not lengthen; memory is the process's peak.

import { readFileSync } from 'node:fs';
import * as ort from 'onnxruntime-web/wasm';

const [folder, sizes = '512x512', graphs = 'vae_encoder,unet,vae_decoder', runs = '3'] = process.argv.slice(2);
const runtime = new URL('./node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm', import.meta.url);
ort.env.wasm.wasmBinary = readFileSync(runtime).buffer;
ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'error';

const index = JSON.parse(readFileSync(`${folder}/model_index.json`));
const unet = JSON.parse(readFileSync(`${folder}/unet/config.json`));
const factor = index.vae_scale_factor;
const files = JSON.parse(readFileSync(`${folder}/files.json`));
const isLarge = Object.values(files).reduce((sum, { size }) => sum + size, 0) > 100 * 2 ** 20;

async function timed(act) {
  const before = process.cpuUsage();
  const result = await act();
  const { user, system } = process.cpuUsage(before);
  return [(user + system) / 1e6, result];
}

function noise(channels, height, width) {
  const data = Float32Array.from({ length: channels * height * width }, () => 2 * Math.random() - 1);
  return new ort.Tensor('float32', data, [1, channels, height, width]);
}

function feeds(graph, height, width) {
  const [h, w] = [height / factor, width / factor];
  if (graph === 'vae_encoder') return { sample: noise(3, height, width) };
  if (graph === 'vae_decoder') return { latent_sample: noise(unet.out_channels, h, w) };
  return {
    sample: noise(unet.in_channels, h, w),
    timestep: new ort.Tensor('float32', Float32Array.of(500), [1]),
    encoder_hidden_states: new ort.Tensor('float32', Float32Array.of(0), [1, 1, 1]),
  };
}

for (const graph of graphs.split(',')) {
  const read = (file) => {
    const { buffer, byteOffset, length } = readFileSync(`${folder}/${graph}/${file}`);
    return new Uint8Array(buffer, byteOffset, length);
  };
  // As src/runtime.ts opens them; nothing holds the weights once the runtime has them.
  const open = async () => {
    const options = { executionProviders: ['wasm'] };
    if (isLarge) {
      options.graphOptimizationLevel = 'basic';
      options.extra = { optimization: { disable_specified_optimizers: 'ConstantFolding' } };
    }
    const data = read('model.onnx_data');
    options.externalData = [{ path: 'model.onnx_data', data }];
    const session = await ort.InferenceSession.create(read('model.onnx'), options);
    structuredClone(data.buffer, { transfer: [data.buffer] });
    return session;
  };
  const [opening, session] = await timed(open);
  for (const size of sizes.split(',')) {
    const [height, width] = size.split('x').map(Number);
    const inputs = feeds(graph, height, width);
    const seconds = [];
    for (let run = 0; run < Number(runs); run++) seconds.push((await timed(() => session.run(inputs)))[0]);
    const peak = process.resourceUsage().maxRSS / 1024;
    console.log(
      `${graph} ${size}: ${seconds.map((value) => value.toFixed(2)).join(' ')} s;`,
      `opened in ${opening.toFixed(2)} s; peak ${peak.toFixed(0)} MB`,
    );
  }
  await session.release();
}
