/** The steps of the inpainting pipeline, on three functions that run the graphs. */

import { type DetailMode, addDetail } from './detail';
import { guide, isGuided } from './guidance';
import { type PasteMode, pasteFill } from './paste';
import type { Multiply } from './patches';
import { NoiseSource, TorchGenerator } from './random';
import {
  type Box,
  type Mask,
  type Planes,
  cropMask,
  cropPlanes,
  cropRegion,
  padToMultiple,
  planes,
  readBox,
  resize,
  resizeMask,
  workingSize,
} from './region';
import { type SchedulerConfig, makeScheduler } from './schedulers';

const NOISE_OFFSET = 0.0357;

/** What an exported folder says of itself. */
export interface ModelConfig {
  scheduler: SchedulerConfig;
  /** Channels of the latents. */
  latentChannels: number;
  /** Side in pixels that the model was trained on. */
  nativeSize: number;
  /** Pixels a latent. */
  factor: number;
  /** What height and width must be divisible by, in pixels. */
  multiple: number;
  scalingFactor: number;
  shiftFactor: number;
  defaults: Defaults;
}

/** What a checkpoint says of a run. */
export interface Defaults {
  steps: number;
  strength: number;
  guidanceScale: number;
  guidanceStart: number;
  detail: DetailMode;
  paste: PasteMode;
}

export interface Graphs {
  /** Latents, or mean and logarithm of the variance of their distribution. */
  encode(image: Planes): Promise<Planes>;
  decode(latents: Planes): Promise<Planes>;
  /** One prediction for each category: 0 background, 1 foreground. */
  predict(sample: Planes, timestep: number, categories: number[]): Promise<Float32Array[]>;
  multiply: Multiply;
}

export interface Settings extends Defaults {
  margin: number;
  seed: number;
}

export interface Patch {
  box: Box;
  pixels: Uint8ClampedArray<ArrayBuffer>;
}

/** The timesteps that a run takes: all but the first ones that `strength` leaves out. */
export function keptSteps(steps: number, strength: number): number {
  const kept = Math.floor(steps * strength);
  if (kept < 1) throw new Error('The strength leaves no step to run.');
  return kept;
}

/** Changes pipeline settings for few steps, as `MoebiusInpaintPipeline.use_few_steps` does. */
export function useFewSteps(config: ModelConfig, steps = 5): ModelConfig {
  if (config.defaults.steps <= steps) return config;
  const { _class_name: _, timestep_spacing: __, ...shared } = config.scheduler;
  return {
    ...config,
    scheduler: {
      ...shared,
      _class_name: 'UniPCMultistepScheduler',
      timestep_spacing: 'trailing',
      clip_sample: false,
    } as SchedulerConfig,
    defaults: { ...config.defaults, steps, strength: 1, guidanceStart: Math.floor(0.4 * steps) / steps },
  };
}

/**
 * Fills the marked part of a photo; `onStep` is told the number of steps that are done, and of all, and `onDetail` the
 * share of the texture.
 */
export async function inpaint(
  graphs: Graphs,
  config: ModelConfig,
  pixels: Uint8ClampedArray,
  mask: Mask,
  settings: Settings,
  onStep: (done: number, total: number) => void,
  onDetail: (share: number) => void,
): Promise<Patch> {
  const box = cropRegion(mask, settings.margin, 2 * config.factor);
  if (box === null) throw new Error('Nothing is marked.');
  const [boxHeight, boxWidth] = [box[3] - box[1], box[2] - box[0]];
  const [height, width] = workingSize(boxHeight, boxWidth, config.nativeSize);
  const original = readBox(pixels, mask.width, box);

  // The region as the model sees it: the picture in [-1, 1], and the hole.
  const scaled = padToMultiple(resize(original, height, width), config.multiple);
  const image = { ...scaled, data: scaled.data.map((value) => 2 * value - 1) };
  const small = resizeMask(cropMask(mask, box), height, width);
  const hole = padToMultiple({ ...small, channels: 1, data: Float32Array.from(small.data) }, config.multiple);
  const masked = { ...image, data: image.data.map((value, i) => value * (1 - hole.data[i % hole.data.length])) };

  const noise = new NoiseSource(settings.seed);
  const draw = (count: number) => noise.draw(count);
  const encode = async (picture: Planes) => latentsOf(await graphs.encode(picture), config, draw);
  const imageLatents = settings.strength < 1 ? await encode(image) : null;
  const maskedLatents = await encode(masked);
  const [latentHeight, latentWidth] = [image.height / config.factor, image.width / config.factor];
  const area = latentHeight * latentWidth;
  const count = config.latentChannels * area;
  const start = draw(count);
  const offsets = draw(config.latentChannels);
  for (let i = 0; i < count; i++) start[i] += NOISE_OFFSET * offsets[Math.floor(i / area)];

  const scheduler = makeScheduler(config.scheduler, settings.steps);
  const kept = keptSteps(settings.steps, settings.strength);
  scheduler.begin(settings.steps - kept);
  const timesteps = scheduler.timesteps.slice(settings.steps - kept);
  let latents: Float32Array = imageLatents ? scheduler.addNoise(imageLatents.data, start) : start;

  // The input of the U-Net: latents, mask, latents of the masked picture.
  const sample = planes(2 * config.latentChannels + 1, latentHeight, latentWidth);
  for (let y = 0, i = count; y < latentHeight; y++)
    for (let x = 0; x < latentWidth; x++, i++)
      sample.data[i] = hole.data[config.factor * (y * hole.width + x)];
  sample.data.set(maskedLatents.data, count + area);
  for (const [i, timestep] of timesteps.entries()) {
    sample.data.set(latents);
    let prediction: Float32Array;
    if (isGuided(i, timesteps.length, settings.guidanceScale, settings.guidanceStart)) {
      const [foreground, background] = await graphs.predict(sample, timestep, [1, 0]);
      prediction = guide(foreground, background, settings.guidanceScale);
    } else [prediction] = await graphs.predict(sample, timestep, [0]);
    latents = scheduler.step(prediction, latents, draw);
    onStep(i + 1, timesteps.length);
  }

  const unscaled = latents.map((value) => value / config.scalingFactor + config.shiftFactor);
  const decoded = await graphs.decode({ ...maskedLatents, data: unscaled });
  if (!decoded.data.every(Number.isFinite)) throw new Error('The model gave numbers that are not finite.');
  const picture = { ...decoded, data: decoded.data.map((value) => Math.min(Math.max(value / 2 + 0.5, 0), 1)) };
  const fill = resize(cropPlanes(picture, height, width), boxHeight, boxWidth);
  const enlargement = Math.max(boxHeight / height, boxWidth / width);
  const random = new TorchGenerator(settings.seed);
  const { detail } = settings;
  const detailed = await addDetail(fill, pixels, mask, box, enlargement, detail, random, graphs.multiply, onDetail);
  return { box, pixels: pasteFill(pixels, detailed, original, mask, box, settings.paste) };
}

function latentsOf(encoded: Planes, config: ModelConfig, draw: (count: number) => Float32Array): Planes {
  const { latentChannels: channels, scalingFactor, shiftFactor } = config;
  let data = encoded.data;
  if (encoded.channels === 2 * channels) {
    // A sample of the distribution, of which the graph gives the mean and the logarithm of the variance.
    const count = data.length / 2;
    const noise = draw(count);
    data = data.slice(0, count).map((mean, i) => {
      const logarithm = Math.min(Math.max(encoded.data[count + i], -30), 20);
      return mean + Math.exp(0.5 * logarithm) * noise[i];
    });
  }
  return { ...encoded, channels, data: data.map((value) => (value - shiftFactor) * scalingFactor) };
}
