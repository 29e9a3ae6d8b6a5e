/** The schedulers of diffusers that exported pipelines name, with the same numbers. */

import { roundHalfEven } from './region';

export interface SchedulerConfig {
  _class_name: string;
  num_train_timesteps: number;
  beta_start: number;
  beta_end: number;
  beta_schedule: string;
  prediction_type: string;
  timestep_spacing?: string;
  steps_offset?: number;
  set_alpha_to_one?: boolean;
  clip_sample?: boolean;
  clip_sample_range?: number;
  thresholding?: boolean;
  rescale_betas_zero_snr?: boolean;
  original_inference_steps?: number;
  timestep_scaling?: number;
  solver_order?: number;
  solver_type?: string;
  lower_order_final?: boolean;
  [setting: string]: unknown;
}

export interface Scheduler {
  readonly timesteps: number[];
  /** Skips the first timesteps, for a strength below 1. */
  begin(index: number): void;
  addNoise(image: Float32Array, noise: Float32Array): Float32Array;
  /** The latents after a step; `draw` gives fresh noise where the scheduler wants it. */
  step(prediction: Float32Array, latents: Float32Array, draw: (count: number) => Float32Array): Float32Array;
}

const f = Math.fround; // torch computes the schedule in float32

function linspace(start: number, end: number, count: number): number[] {
  const step = f(f(end - start) / (count - 1));
  return Array.from({ length: count }, (_, i) =>
    i < count / 2 ? f(f(start) + f(step * i)) : f(f(end) - f(step * (count - 1 - i))),
  );
}

/** The product of `1 - beta` up to each training timestep. */
function alphasCumprod(config: SchedulerConfig): number[] {
  const count = config.num_train_timesteps;
  let betas: number[];
  if (config.beta_schedule === 'linear') betas = linspace(config.beta_start, config.beta_end, count);
  else if (config.beta_schedule === 'scaled_linear')
    betas = linspace(Math.sqrt(config.beta_start), Math.sqrt(config.beta_end), count).map((x) => f(x * x));
  else throw new Error(`The beta schedule ${config.beta_schedule} is not known here.`);
  const cumprod = (values: number[]) => {
    let product = 1;
    return values.map((value) => f((product *= value)));
  };
  let alphas = betas.map((beta) => f(1 - beta));
  if (config.rescale_betas_zero_snr) {
    const roots = cumprod(alphas).map((x) => f(Math.sqrt(x)));
    const [first, last] = [roots[0], roots[count - 1]];
    const bars = roots.map((x) => f(f(f(x - last) * f(first / f(first - last))) ** 2));
    alphas = bars.map((bar, i) => f(1 - f(1 - f(i === 0 ? bar : bar / bars[i - 1]))));
  }
  return cumprod(alphas);
}

abstract class AlphaScheduler implements Scheduler {
  abstract readonly timesteps: number[];
  protected readonly alphas: number[];
  protected index = 0;

  constructor(
    protected readonly config: SchedulerConfig,
    protected readonly steps: number,
  ) {
    this.alphas = alphasCumprod(config);
    if (config.thresholding) throw new Error('The scheduler uses dynamic thresholding, which is not known here.');
  }

  begin(index: number): void {
    this.index = index;
  }

  addNoise(image: Float32Array, noise: Float32Array): Float32Array {
    const alpha = this.alphas[this.timesteps[this.index]];
    const [a, b] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
    return image.map((x, i) => a * x + b * noise[i]);
  }

  /** The clean latents and the noise that a prediction means. */
  protected split(prediction: Float32Array, latents: Float32Array, alpha: number): [Float32Array, Float32Array] {
    const [a, b] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
    const clean = new Float32Array(latents.length);
    const noise = new Float32Array(latents.length);
    const limit = this.config.clip_sample ? (this.config.clip_sample_range ?? 1) : Infinity;
    for (let i = 0; i < latents.length; i++) {
      const [p, x] = [prediction[i], latents[i]];
      if (this.config.prediction_type === 'epsilon') [clean[i], noise[i]] = [(x - b * p) / a, p];
      else if (this.config.prediction_type === 'v_prediction') [clean[i], noise[i]] = [a * x - b * p, a * p + b * x];
      else if (this.config.prediction_type === 'sample') [clean[i], noise[i]] = [p, (x - a * p) / b];
      else throw new Error(`The prediction type ${this.config.prediction_type} is not known here.`);
      clean[i] = Math.min(Math.max(clean[i], -limit), limit);
    }
    return [clean, noise];
  }

  abstract step(
    prediction: Float32Array,
    latents: Float32Array,
    draw: (count: number) => Float32Array,
  ): Float32Array;
}

/** Timesteps of the spacings of arXiv 2305.08891, table 2; UniPC counts one step more in two of them. */
function spacedTimesteps(config: SchedulerConfig, steps: number, extra: 0 | 1): number[] {
  const total = config.num_train_timesteps;
  const offset = config.steps_offset ?? 0;
  const spacing = config.timestep_spacing ?? 'leading';
  if (spacing === 'leading') {
    const ratio = Math.floor(total / (steps + extra));
    return Array.from({ length: steps }, (_, i) => (steps - 1 + extra - i) * ratio + offset);
  }
  if (spacing === 'linspace') {
    const ratio = (total - 1) / (steps + extra - 1);
    return Array.from({ length: steps }, (_, i) =>
      steps === 1 && !extra ? 0 : roundHalfEven((steps - 1 + extra - i) * ratio),
    );
  }
  if (spacing === 'trailing') {
    const delta = total - total / steps - total;
    return Array.from({ length: Math.ceil(-total / (-total / steps)) }, (_, i) => roundHalfEven(total + i * delta) - 1);
  }
  throw new Error(`The timestep spacing ${spacing} is not known here.`);
}

class DDIMScheduler extends AlphaScheduler {
  readonly timesteps = spacedTimesteps(this.config, this.steps, 0);

  step(prediction: Float32Array, latents: Float32Array): Float32Array {
    const timestep = this.timesteps[this.index++];
    const previous = timestep - Math.floor(this.config.num_train_timesteps / this.steps);
    const last = this.config.set_alpha_to_one ?? true ? 1 : this.alphas[0];
    const alpha = previous >= 0 ? this.alphas[previous] : last;
    const [clean, noise] = this.split(prediction, latents, this.alphas[timestep]);
    const [a, b] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
    return clean.map((x, i) => a * x + b * noise[i]);
  }
}

/** Timesteps of the few-step schedulers: evenly spaced among those of the distillation. */
function distilledTimesteps(config: SchedulerConfig, steps: number): number[] {
  const original = config.original_inference_steps ?? 50;
  if (steps > original) throw new Error(`At most ${original} steps are possible with this scheduler.`);
  const ratio = Math.floor(config.num_train_timesteps / original);
  return Array.from({ length: steps }, (_, i) => (original - Math.floor((i * original) / steps)) * ratio - 1);
}

class LCMScheduler extends AlphaScheduler {
  readonly timesteps = distilledTimesteps(this.config, this.steps);

  step(prediction: Float32Array, latents: Float32Array, draw: (count: number) => Float32Array): Float32Array {
    const timestep = this.timesteps[this.index++];
    const [clean] = this.split(prediction, latents, this.alphas[timestep]);
    const scaled = timestep * (this.config.timestep_scaling ?? 10);
    const skip = 0.25 / (scaled ** 2 + 0.25);
    const out = scaled / Math.sqrt(scaled ** 2 + 0.25);
    const denoised = clean.map((x, i) => out * x + skip * latents[i]);
    if (this.index >= this.timesteps.length) return denoised;
    const alpha = this.alphas[this.timesteps[this.index]];
    const [a, b] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
    const noise = draw(latents.length);
    return denoised.map((x, i) => a * x + b * noise[i]);
  }
}

class TCDScheduler extends AlphaScheduler {
  readonly timesteps = distilledTimesteps(this.config, this.steps);
  // The pipeline's own default, which it hands to every scheduler that takes one.
  private readonly eta = 0;

  step(prediction: Float32Array, latents: Float32Array): Float32Array {
    const timestep = this.timesteps[this.index++];
    const previous = this.timesteps[this.index] ?? 0;
    const alpha = this.alphas[Math.floor((1 - this.eta) * previous)];
    const [clean, noise] = this.split(prediction, latents, this.alphas[timestep]);
    const [a, b] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
    return clean.map((x, i) => a * x + b * noise[i]);
  }
}

/** UniPC (arXiv 2302.04867) of order one or two, with the data as prediction. */
class UniPCMultistepScheduler extends AlphaScheduler {
  readonly timesteps = spacedTimesteps(
    { ...this.config, timestep_spacing: this.config.timestep_spacing ?? 'linspace' },
    this.steps,
    1,
  );
  private readonly sigmas: number[];
  private outputs: { clean: Float32Array; index: number }[] = [];
  private last?: { latents: Float32Array; order: number };

  constructor(config: SchedulerConfig, steps: number) {
    super(config, steps);
    const variants = ['use_karras_sigmas', 'use_exponential_sigmas', 'use_beta_sigmas', 'use_flow_sigmas'];
    const unknown = variants.find((name) => config[name]);
    if (unknown || (config.solver_order ?? 2) > 2 || config.predict_x0 === false)
      throw new Error(`This setting of UniPC is not known here: ${unknown ?? 'solver_order or predict_x0'}.`);
    if (config.rescale_betas_zero_snr) this.alphas[this.alphas.length - 1] = 2 ** -24;
    const sigma = (alpha: number) => f(Math.sqrt(f((1 - alpha) / alpha)));
    this.sigmas = this.timesteps.map((t) => sigma(this.alphas[t]));
    this.sigmas.push(config.final_sigmas_type === 'sigma_min' ? sigma(this.alphas[0]) : 0);
  }

  private at(index: number): { alpha: number; sigma: number; lambda: number } {
    const alpha = 1 / Math.sqrt(this.sigmas[index] ** 2 + 1);
    const sigma = this.sigmas[index] * alpha;
    return { alpha, sigma, lambda: Math.log(alpha) - Math.log(sigma) };
  }

  /** From latents at one index to the next, by what was predicted up to the first, and there if `arrived` is given. */
  private move(latents: Float32Array, from: number, order: number, arrived?: Float32Array): Float32Array {
    const [s, t] = [this.at(from), this.at(from + 1)];
    const h = t.lambda - s.lambda;
    const phi = Math.expm1(-h);
    const size = this.config.solver_type === 'bh1' ? -h : phi;
    const [now, before] = this.outputs;
    const r = order === 2 ? (this.at(before.index).lambda - s.lambda) / h : 1;
    let [slope, ahead] = [order === 2 ? 0.5 : 0, 0];
    if (arrived !== undefined) {
      // Order 1: a half. Order 2: the two conditions for the slopes behind and ahead.
      const first = phi / -h - 1;
      const second = first / -h - 1 / 2;
      const [b1, b2] = [first / size, (2 * second) / size];
      if (order === 2) {
        ahead = (b2 - r * b1) / (1 - r);
        slope = b1 - ahead;
      } else ahead = 0.5;
    }
    return latents.map((x, i) => {
      const m = now.clean[i];
      let change = order === 2 ? (slope * (before.clean[i] - m)) / r : 0;
      if (arrived !== undefined) change += ahead * (arrived[i] - m);
      return (t.sigma / s.sigma) * x - t.alpha * phi * m - (change === 0 ? 0 : t.alpha * size * change);
    });
  }

  addNoise(image: Float32Array, noise: Float32Array): Float32Array {
    const { alpha, sigma } = this.at(this.index);
    return image.map((x, i) => alpha * x + sigma * noise[i]);
  }

  step(prediction: Float32Array, latents: Float32Array): Float32Array {
    const { alpha, sigma } = this.at(this.index);
    const clean = latents.map((x, i) => {
      if (this.config.prediction_type === 'epsilon') return (x - sigma * prediction[i]) / alpha;
      if (this.config.prediction_type === 'v_prediction') return alpha * x - sigma * prediction[i];
      if (this.config.prediction_type === 'sample') return prediction[i];
      throw new Error(`The prediction type ${this.config.prediction_type} is not known here.`);
    });
    if (this.last) latents = this.move(this.last.latents, this.index - 1, this.last.order, clean);
    this.outputs = [{ clean, index: this.index }, ...this.outputs].slice(0, 2);
    const limit = this.config.lower_order_final ?? true ? this.timesteps.length - this.index : 2;
    const order = Math.min(this.config.solver_order ?? 2, limit, this.outputs.length);
    this.last = { latents, order };
    const result = this.move(latents, this.index, order);
    this.index++;
    return result;
  }
}

const CLASSES = { DDIMScheduler, LCMScheduler, TCDScheduler, UniPCMultistepScheduler };

/** Whether an exported pipeline's scheduler is one of those here. */
export function isKnownScheduler(name: string): name is keyof typeof CLASSES {
  return name in CLASSES;
}

export function makeScheduler(config: SchedulerConfig, steps: number): Scheduler {
  if (!isKnownScheduler(config._class_name)) throw new Error(`The scheduler ${config._class_name} is not known here.`);
  return new CLASSES[config._class_name](config, steps);
}
