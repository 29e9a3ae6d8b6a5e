/** The cases that tests/spaces/browser/test_browser_cases.py writes with the package's own numbers. */

import { readFileSync } from 'node:fs';
import { beforeEach, describe, expect, test } from 'vitest';
import { CONSTANTS, addDetail, heldOutErrors } from '../src/detail';
import { topEigenvectors } from '../src/eigen';
import { guide, isGuided } from '../src/guidance';
import { dilateMask, featherInwards, invert, matchEdges, pasteFill } from '../src/paste';
import { ENLARGED, type Multiply, SETTINGS, blur, fillWithPatches, roughness } from '../src/patches';
import { type ModelConfig, useFewSteps } from '../src/pipeline';
import { NoiseSource, TorchGenerator } from '../src/random';
import {
  type Box,
  type Mask,
  type Planes,
  cropMask,
  cropRegion,
  fillHole,
  maskBox,
  padToMultiple,
  readBox,
  resize,
  resizeMask,
  workingSize,
} from '../src/region';
import { type SchedulerConfig, makeScheduler } from '../src/schedulers';

// Minutes of tests in a row that wait for nothing would leave the runner without an answer.
beforeEach(() => new Promise((resolve) => setTimeout(resolve)));

interface NumberArray {
  shape: number[];
  data: number[];
}

if (!process.env.MOEBIUS_CASES) throw new Error('pytest tests/spaces/browser/test_browser_cases.py writes the cases and runs this.');
// JSON of Python, whose infinite and missing numbers do not occur in the cases.
const cases = JSON.parse(readFileSync(process.env.MOEBIUS_CASES, 'utf8'));

function expectClose(given: ArrayLike<number>, expected: NumberArray, tolerance: number): void {
  expect(given.length).toBe(expected.data.length);
  let worst = 0;
  for (let i = 0; i < given.length; i++) {
    const difference = Math.abs(given[i] - expected.data[i]) / Math.max(1, Math.abs(expected.data[i]));
    worst = difference <= worst ? worst : difference; // NaN is the worst
  }
  expect(worst).toBeLessThanOrEqual(tolerance);
}

const floats = (array: NumberArray) => Float32Array.from(array.data);
const toMask = ({ data, shape: [height, width] }: NumberArray): Mask => ({ data: Uint8Array.from(data), height, width });
const toPlanes = (array: NumberArray): Planes => {
  const [channels, height, width] = array.shape;
  return { data: floats(array), channels, height, width };
};

for (const { seed, start, values } of cases.noise)
  test(`noise of seed ${seed}`, () => {
    const source = new NoiseSource(seed);
    source.draw(start);
    expectClose(source.draw(values.data.length), values, 1e-6);
  });

describe('schedulers', () => {
  for (const one of cases.schedulers)
    test(`${one.config._class_name}, ${one.steps} steps, ${one.config.prediction_type}`, () => {
      const scheduler = makeScheduler(one.config as SchedulerConfig, one.steps);
      expect(scheduler.timesteps).toEqual(one.timesteps.data);
      scheduler.begin(one.begin);
      let latents = scheduler.addNoise(floats(one.image), floats(one.noise));
      expectClose(latents, one.start, 1e-5);
      for (const step of one.run) {
        latents = scheduler.step(floats(step.prediction), latents, () => floats(step.fresh));
        expectClose(latents, step.latents, 1e-5);
        latents = floats(step.latents);
      }
    });

  test('what is not known is refused', () => {
    const config = cases.schedulers[0].config;
    for (const change of [
      { _class_name: 'EulerDiscreteScheduler' },
      { beta_schedule: 'squaredcos_cap_v2' },
      { timestep_spacing: 'random' },
      { thresholding: true },
      { _class_name: 'UniPCMultistepScheduler', use_karras_sigmas: true },
      { _class_name: 'LCMScheduler', original_inference_steps: 5 },
    ])
      expect(() => makeScheduler({ ...config, ...change }, 20)).toThrow();
  });
});

for (const { steps, scale, start, end, guided } of cases.guidance)
  test(`guided of ${steps} steps from ${start} to ${end}`, () => {
    expect(guided).toEqual(Array.from({ length: steps }, (_, i) => isGuided(i, steps, scale, start, end)));
  });

test('guidance goes away from the foreground', () => {
  expect([...guide(Float32Array.of(1, 0), Float32Array.of(2, -1), 2.5)]).toEqual([3.5, -2.5]);
});

test('few steps', () => {
  const expected = cases.fewSteps;
  const config = {
    scheduler: expected.scheduler,
    defaults: { steps: 20, strength: 0.99, guidanceScale: 2.5, guidanceStart: 0, paste: 'exact' },
  } as ModelConfig;
  const { scheduler, defaults } = useFewSteps(config);
  expect(makeScheduler(scheduler, defaults.steps).timesteps).toEqual(expected.timesteps.data);
  expect(defaults).toMatchObject({
    steps: expected.steps,
    strength: expected.strength,
    guidanceStart: expected.guidanceStart,
  });
  const own = { ...config, defaults: { ...config.defaults, steps: 4 } };
  expect(useFewSteps(own)).toBe(own);
});

describe('regions', () => {
  for (const one of cases.regions) {
    const mask = toMask(one.mask);
    test(`of ${mask.height} x ${mask.width} px`, () => {
      expect(maskBox(mask, one.margin)).toEqual(one.maskBox);
      const box = cropRegion(mask, one.margin, 16)!;
      expect(box).toEqual(one.box);
      const size = workingSize(box[3] - box[1], box[2] - box[0], one.native);
      expect(size).toEqual(one.size);
      expectClose(resizeMask(mask, ...size).data, one.resizedMask, 0);
      expectClose(dilateMask(mask, 5).data, one.dilated, 0);
    });
  }

  test('without a mask there is none', () => {
    expect(cropRegion({ data: new Uint8Array(12), height: 3, width: 4 }, 2, 16)).toBeNull();
  });
});

describe('resizing', () => {
  for (const one of cases.resizes)
    test(`${one.image.shape} to ${one.size}`, () => {
      const image = toPlanes(one.image);
      const [height, width] = one.size;
      expectClose(resize(image, height, width).data, one.resized, 1e-5);
      expectClose(padToMultiple(image, 16).data, one.padded, 1e-6);
    });
});

describe('pasting', () => {
  for (const one of cases.pastes)
    test(`into ${one.mask.shape}`, () => {
      const mask = toMask(one.mask);
      const box = one.box as Box;
      const fill = toPlanes(one.fill);
      const pixels = toPixels(one.photo);
      const original = readBox(pixels, mask.width, box);
      expectClose(featherInwards(mask), one.weights, 1e-6);
      expectClose(matchEdges(fill, original, cropMask(mask, box)).data, one.matched, 1e-4);
      for (const mode of ['exact', 'seamless'] as const) {
        const patch = pasteFill(pixels, fill, original, mask, box, mode);
        let [worst, outside] = [0, 0];
        const width = box[2] - box[0];
        for (let i = 0; i < patch.length; i++) {
          const [x, y] = [box[0] + (Math.floor(i / 4) % width), box[1] + Math.floor(i / 4 / width)];
          const expected = i % 4 === 3 ? 255 : one[mode].data[3 * (y * mask.width + x) + (i % 4)];
          const difference = Math.abs(patch[i] - expected);
          worst = Math.max(worst, difference);
          if (!mask.data[y * mask.width + x]) outside = Math.max(outside, difference);
        }
        expect(outside).toBe(0);
        expect(worst).toBeLessThanOrEqual(1);
      }
    });
});

for (const one of cases.generators)
  test(`torch's numbers of seed ${one.seed} below ${one.limit}`, () => {
    const generator = new TorchGenerator(one.seed);
    expect([...generator.integers(one.limit, one.integers.data.length)]).toEqual(one.integers.data);
    expect([...generator.uniform(5)]).toEqual(one.uniform.data);
  });

const toPixels = (photo: NumberArray): Uint8ClampedArray => {
  const pixels = new Uint8ClampedArray((4 * photo.data.length) / 3).fill(255);
  photo.data.forEach((value, i) => (pixels[4 * Math.floor(i / 3) + (i % 3)] = value));
  return pixels;
};

const multiply: Multiply = async (a, b, { rows, inner, columns }) => {
  const result = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    const sums = new Float64Array(columns);
    for (let i = 0; i < inner; i++)
      for (let column = 0; column < columns; column++) sums[column] += a[row * inner + i] * b[i * columns + column];
    result.set(sums, row * columns);
  }
  return result;
};

test('principal components', () => {
  const size = 50; // eigenvalues 1, 1/2, 1/4, … on vectors that a reflection turns
  const normal = new NoiseSource(1).draw(size);
  const length = normal.reduce((sum, value) => sum + value * value, 0);
  const vector = (i: number, k: number) => (i === k ? 1 : 0) - (2 * normal[i] * normal[k]) / length;
  const matrix = new Float32Array(size * size);
  for (let row = 0; row < size; row++)
    for (let column = 0; column < size; column++)
      for (let i = 0; i < size; i++) matrix[row * size + column] += 2 ** -i * vector(i, row) * vector(i, column);
  const found = topEigenvectors(matrix, size, 12);
  for (let i = 0; i < 12; i++) {
    let dot = 0;
    for (let k = 0; k < size; k++) dot += found[i * size + k] * vector(i, k);
    expect(Math.abs(dot)).toBeCloseTo(1, 4);
  }
  expect([...topEigenvectors(new Float32Array(size * size), size, 3)].every((value) => value === 0)).toBe(true);
});

for (const one of cases.holes)
  test(`around a hole of ${one.hole.shape}`, () => {
    const [image, hole] = [toPlanes(one.image), toMask(one.hole)];
    expectClose(fillHole(image, hole).data, one.filled, 1e-5);
    expectClose(blur(image, 2.5).data, one.blurred, 1e-5);
    expectClose(roughness(image, invert(hole)).data, one.rough, 1e-5);
  });

/** All pixels but a few: where two patches fit equally well, rounding decides between them. */
function expectAlike(given: ArrayLike<number>, expected: NumberArray, few = 0.01): void {
  expect(given.length).toBe(expected.data.length);
  let different = 0;
  for (let i = 0; i < given.length; i++) if (!(Math.abs(given[i] - expected.data[i]) <= 1 / 255)) different++;
  expect(different / given.length).toBeLessThanOrEqual(few);
}

describe('texture', () => {
  test('the constants are those of the package', () => {
    expect([CONSTANTS, SETTINGS, ENLARGED]).toEqual(cases.detailConstants);
  });

  for (const one of cases.patches)
    test(`patches, ${JSON.stringify(one.settings)}`, async () => {
      const [image, guide] = [toPlanes(one.image), toPlanes(one.guide)];
      const [hole, source] = [toMask(one.hole), toMask(one.source)];
      const shares: number[] = [];
      const onWork = (share: number) => shares.push(share);
      const tools = () => ({ multiply, random: new TorchGenerator(one.seed), onWork });
      const settings = { ...SETTINGS, ...one.settings };
      const filled = await fillWithPatches(image, hole, source, guide, one.lead, tools(), settings, one.copy);
      expectAlike(filled.data, one.filled);
      expect(shares.at(-1)).toBeCloseTo(1);
      expect(shares).toEqual([...shares].sort((a, b) => a - b));
      const errors = await heldOutErrors(image, hole, source, { ...tools(), onWork: undefined });
      errors.forEach((error, i) => expect(error / one.errors[i]).toBeCloseTo(1, 2));
    });

  for (const one of cases.details)
    test(`${one.detail}, ${one.enlargement}`, async () => {
      const [mask, box, random] = [toMask(one.mask), one.box as Box, new TorchGenerator(one.seed)];
      const { enlargement, detail } = one;
      const pixels = toPixels(one.photo);
      const result = await addDetail(toPlanes(one.fill), pixels, mask, box, enlargement, detail, random, multiply);
      expectAlike(result.data, one.result);
    });

  test('nothing to do', async () => {
    const [pixels, fill] = [new Uint8ClampedArray(4 * 16), toPlanes({ shape: [3, 4, 4], data: Array(48).fill(0.5) })];
    for (const [value, detail] of [[0, 'patches'], [1, 'patches'], [1, null]] as const) {
      const mask = { data: new Uint8Array(16).fill(value), height: 4, width: 4 };
      const random = new TorchGenerator(0);
      expect(await addDetail(fill, pixels, mask, [0, 0, 4, 4], 2, detail, random, multiply)).toBe(fill);
    }
  });
});
