/** A hole filled with patches of the picture around it: the search and the vote of `pictures/detail.py`. */

import { topEigenvectors } from './eigen';
import { dilateMask, erodeMask, invert } from './paste';
import type { TorchGenerator } from './random';
import { type Mask, type Planes, fillHole, halve, planes, roundHalfEven } from './region';

/** How patches are compared and put together; what each setting means is said in the package. */
export const SETTINGS = {
  radius: 3,
  components: 24,
  texture: 6,
  position: [1, 0.5],
  leadSigma: 8,
  thin: 5,
  iterations: [4, 8],
  exact: 50_000_000, // a quarter of the package's: four times as many take nearly twice as long here
  searchPixels: 800_000,
  mean: 0.1,
  shift: 0.05,
  gamma: 3,
  spread: 13,
  around: 0,
};
export type Settings = typeof SETTINGS;
/** Those for what enlarging takes away. */
export const ENLARGED: Settings = {
  ...SETTINGS,
  texture: 0,
  position: [0.1, 0.1],
  iterations: [4, 6],
  mean: 1,
  shift: 0,
};

/** The product of two matrices, `[rows, inner]` times `[inner, columns]`. */
export type Multiply = (
  a: Float32Array,
  b: Float32Array,
  shape: { rows: number; inner: number; columns: number },
) => Promise<Float32Array>;

/** What a search needs from outside; `onWork` is told of the share of a filling that is done. */
export interface Tools {
  multiply: Multiply;
  random: TorchGenerator;
  onWork?: (share: number) => void;
}

/** Rows of patches that are compared by their components at once. */
const BLOCK = 4096;

export function count(mask: Mask): number {
  return mask.data.reduce((sum, value) => sum + value, 0);
}

function combine(one: Mask, other: Mask, test: (one: number, other: number) => boolean): Mask {
  return { ...one, data: one.data.map((value, i) => (test(value, other.data[i]) ? 1 : 0)) };
}

export const both = (one: Mask, other: Mask) => combine(one, other, (a, b) => a > 0 && b > 0);
export const without = (one: Mask, other: Mask) => combine(one, other, (a, b) => a > 0 && b === 0);

/** Leaves pixels whose whole neighbourhood is in the mask and in the picture. */
export function shrink(mask: Mask, pixels: number): Mask {
  const { height, width } = mask;
  const result = erodeMask(mask, pixels);
  for (let y = 0, i = 0; y < height; y++)
    for (let x = 0; x < width; x++, i++)
      if (Math.min(x, y, width - 1 - x, height - 1 - y) < pixels) result.data[i] = 0;
  return result;
}

export function asPlanes(mask: Mask): Planes {
  return { ...mask, channels: 1, data: Float32Array.from(mask.data) };
}

export function threshold({ data, height, width }: Planes, test: (value: number) => boolean): Mask {
  return { data: Uint8Array.from(data, (value) => (test(value) ? 1 : 0)), height, width };
}

export const isMost = (value: number) => value >= 0.6;

/** Halves a picture of which only a part is known: the means of what is, and how much that is. */
export function halveKnown(image: Planes, known: Mask): { small: Planes; share: Planes } {
  const share = halve(asPlanes(known));
  const size = known.data.length;
  const small = halve({ ...image, data: image.data.map((value, i) => (known.data[i % size] ? value : 0)) });
  small.data.forEach((value, i) => (small.data[i] = value / Math.max(share.data[i % share.data.length], 1e-6)));
  return { small, share };
}

/** Gaussian blur. */
export function blur(image: Planes, sigma: number): Planes {
  if (sigma < 0.3) return image;
  const reach = Math.ceil(2.5 * sigma);
  const kernel = new Float64Array(2 * reach + 1);
  for (let x = -reach; x <= reach; x++) kernel[reach + x] = Math.exp(-(x ** 2) / (2 * sigma ** 2));
  const sum = kernel.reduce((total, weight) => total + weight, 0);
  const { data, channels, height, width } = image;
  const middle = planes(channels, height, width);
  const line = new Float32Array(width + 2 * reach);
  for (let row = 0; row < data.length; row += width) {
    line.fill(data[row], 0, reach).fill(data[row + width - 1], reach + width);
    line.set(data.subarray(row, row + width), reach);
    for (let x = 0; x < width; x++) {
      let total = 0;
      for (let j = 0; j < kernel.length; j++) total += kernel[j] * line[x + j];
      middle.data[row + x] = total / sum;
    }
  }
  const result = planes(channels, height, width);
  const totals = new Float64Array(width);
  for (let channel = 0; channel < channels; channel++)
    for (let y = 0; y < height; y++) {
      totals.fill(0);
      for (let j = 0; j < kernel.length; j++) {
        const offset = (channel * height + Math.min(Math.max(y + j - reach, 0), height - 1)) * width;
        const weight = kernel[j] / sum;
        for (let x = 0; x < width; x++) totals[x] += weight * middle.data[offset + x];
      }
      result.data.set(totals, (channel * height + y) * width);
    }
  return result;
}

/** Mean absolute gradients of the known pixels around each pixel, across and down. */
export function roughness(image: Planes, known: Mask): Planes {
  const { height, width } = image;
  const size = height * width;
  const [red, green, blue] = [0, 1, 2].map((channel) => image.data.subarray(channel * size, (channel + 1) * size));
  const grey = red.map((value, i) => (value + green[i] + blue[i]) / 3);
  const inner = erodeMask(known, 1).data;
  const sums = planes(3, height, width); // of the gradients, and of pixels
  for (let y = 0, i = 0; y < height; y++)
    for (let x = 0; x < width; x++, i++) {
      if (!inner[i]) continue;
      sums.data[i] = Math.abs(grey[x < width - 1 ? i + 1 : i] - grey[x > 0 ? i - 1 : i]) / 2;
      sums.data[size + i] = Math.abs(grey[y < height - 1 ? i + width : i] - grey[y > 0 ? i - width : i]) / 2;
      sums.data[2 * size + i] = 1;
    }
  const rows = planes(3, height, width);
  for (let row = 0; row < 3 * size; row += width)
    for (let x = 0; x < width; x++)
      for (let j = Math.max(x - 2, 0); j <= Math.min(x + 2, width - 1); j++) rows.data[row + x] += sums.data[row + j];
  sums.data.fill(0);
  for (let channel = 0; channel < 3; channel++)
    for (let y = 0; y < height; y++)
      for (let j = Math.max(y - 2, 0); j <= Math.min(y + 2, height - 1); j++)
        for (let x = 0; x < width; x++)
          sums.data[(channel * height + y) * width + x] += rows.data[(channel * height + j) * width + x] / 25;
  const result = planes(2, height, width);
  for (let i = 0; i < 2 * size; i++) result.data[i] = sums.data[i] / Math.max(sums.data[2 * size + (i % size)], 1e-6);
  return result;
}

/** For each pixel of a mask its distance to the nearest one outside, in steps of a chess king, up to a limit. */
function depths({ data, height, width }: Mask, limit: number): Uint8Array {
  const result = data.map((value) => value * limit);
  const sweep = (from: number, step: number) => {
    for (let n = 0, i = from; n < result.length; n++, i += step) {
      const [x, y] = [i % width, Math.floor(i / width)];
      for (const [right, down] of [[-step, 0], [-1, -step], [0, -step], [1, -step]]) {
        if (x + right < 0 || x + right >= width || y + down < 0 || y + down >= height) continue;
        result[i] = Math.min(result[i], result[i + down * width + right] + 1);
      }
    }
  };
  sweep(0, 1);
  sweep(result.length - 1, -1);
  return result;
}

/** Pixels of all channels beside each other, in rows that are continued on each side. */
function interleave({ data, channels, height, width }: Planes, border: number): Float32Array {
  const result = new Float32Array(channels * (height + 2 * border) * (width + 2 * border));
  let i = 0;
  for (let y = -border; y < height + border; y++) {
    const row = Math.min(Math.max(y, 0), height - 1) * width;
    for (let x = -border; x < width + border; x++) {
      const pixel = row + Math.min(Math.max(x, 0), width - 1);
      for (let channel = 0; channel < channels; channel++) result[i++] = data[channel * height * width + pixel];
    }
  }
  return result;
}

/** The first three channels at nine places around each pixel, and the others. */
function lookAround(image: Planes, step: number): Planes {
  const { height, width } = image;
  const area = height * width;
  const result = planes(24 + image.channels, height, width);
  let at = 0;
  for (const down of [-step, 0, step])
    for (const right of [-step, 0, step])
      for (let channel = 0; channel < 3; channel++)
        for (let y = 0; y < height; y++) {
          const row = channel * area + Math.min(Math.max(y + down, 0), height - 1) * width;
          for (let x = 0; x < width; x++)
            result.data[at++] = image.data[row + Math.min(Math.max(x + right, 0), width - 1)];
        }
  result.data.set(image.data.subarray(3 * area), at);
  return result;
}

/** One scale of the pyramid: where the hole's patches are copied from. */
class Scale {
  readonly image: Planes;
  readonly height: number;
  readonly width: number;
  private readonly valid: Uint8Array;
  private readonly sources: Int32Array;
  private readonly queries: Int32Array;
  private readonly index: Int32Array; // of each position among the queries, or -1
  private readonly match: Int32Array;
  private readonly distance: Float32Array;
  private readonly shift: Float32Array; // of the mean colours, three for each query
  private readonly trust: Float32Array;
  /** Weights of mean colours, of the guide, and of the position, down and across. */
  private readonly weights: [number, number, number, number];
  private basis = new Float32Array();
  private columns = new Uint8Array();
  /** Features of the sources: that of a pixel has the row `rows[pixel]`. */
  private sourceFeatures = new Float32Array();
  private rows = new Int32Array();

  constructor(
    image: Planes,
    readonly hole: Mask,
    source: Mask,
    private guide: Planes,
    private readonly settings: Settings,
    private readonly tools: Tools,
  ) {
    const { radius, gamma, position } = settings;
    const { height, width, data } = hole;
    [this.height, this.width] = [height, width];
    this.image = { ...image, data: image.data.map((value, i) => (data[i % data.length] ? 0 : value)) };
    this.valid = shrink(without(source, hole), radius).data;
    this.sources = indices(this.valid);
    const isQuery = dilateMask(hole, radius);
    this.queries = indices(isQuery.data);
    this.index = new Int32Array(data.length).fill(-1);
    this.queries.forEach((pixel, query) => (this.index[pixel] = query));
    this.match = this.randomSources(this.queries.length);
    this.distance = new Float32Array(this.queries.length);
    this.shift = new Float32Array(3 * this.queries.length);
    const depth = depths(isQuery, 24);
    this.trust = Float32Array.from(this.queries, (query) => gamma ** -depth[query]);
    const side = 2 * radius + 1;
    const pull = (side * contrastOf(image, hole)) / Math.max(height, width);
    this.weights = [side * Math.sqrt(settings.mean), side, position[0] * pull, position[1] * pull];
  }

  private randomSources(count: number): Int32Array {
    return Int32Array.from(this.tools.random.integers(this.sources.length, count), (index) => this.sources[index]);
  }

  private get isExact(): boolean {
    return this.queries.length * this.sources.length <= this.settings.exact;
  }

  /** Finds the principal components of the patches, and the features of those that may be copied. */
  async prepare(): Promise<void> {
    const { radius, components, around } = this.settings;
    if (around) this.guide = lookAround(this.guide, Math.max(1, roundHalfEven(around)));
    const inner = this.image.channels * (2 * radius + 1) ** 2;
    const sample = this.randomSources(4096);
    const patches = this.readPatches(interleave(this.image, radius), sample);
    for (let patch = 0; patch < patches.length; patch += inner)
      for (let channel = 0; channel < 3; channel++) {
        const mean = this.meanOf(patches, patch, channel);
        for (let i = patch + channel; i < patch + inner; i += this.image.channels) patches[i] -= mean;
      }
    const turned = new Float32Array(patches.length);
    for (let j = 0; j < inner; j++) {
      let mean = 0;
      for (let i = 0; i < sample.length; i++) mean += patches[i * inner + j] / sample.length;
      for (let i = 0; i < sample.length; i++) turned[j * sample.length + i] = patches[i * inner + j] -= mean;
    }
    const gram = await this.tools.multiply(turned, patches, { rows: inner, inner: sample.length, columns: inner });
    const vectors = topEigenvectors(gram, inner, components);
    this.basis = new Float32Array(inner * components);
    for (let j = 0; j < components; j++)
      for (let i = 0; i < inner; i++) this.basis[i * components + j] = vectors[j * inner + i];

    // The features that vary most come first: by these two patches mostly turn out not to be alike.
    const size = 4 * Math.ceil((components + 5 + this.guide.channels) / 4); // of what `features` tells, and zeros
    this.columns = new Uint8Array(size).map((_, i) => i);
    const spreads = variances(await this.features(this.image, sample, this.columns), size);
    [...this.columns].sort((i, j) => spreads[j] - spreads[i]).forEach((feature, i) => (this.columns[feature] = i));
    let features = await this.features(this.image, this.sources, this.columns);
    let order = this.sources;
    if (this.isExact) {
      // Sorted by the first feature, so that a search can end where this alone is farther than the best.
      const ranks = new Uint32Array(order.length).map((_, i) => i);
      ranks.sort((i, j) => features[i * size] - features[j * size]);
      const sorted = new Float32Array(features.length);
      ranks.forEach((rank, row) => sorted.set(features.subarray(rank * size, (rank + 1) * size), row * size));
      [features, order] = [sorted, Int32Array.from(ranks, (rank) => this.sources[rank])];
    }
    this.sourceFeatures = features;
    this.rows = new Int32Array(this.valid.length);
    order.forEach((pixel, row) => (this.rows[pixel] = row));
  }

  /** Patches around pixels, one a row; `pixels` come from `interleave`. */
  private readPatches(pixels: Float32Array, centers: Int32Array): Float32Array {
    const { channels } = this.image;
    const side = 2 * this.settings.radius + 1;
    const stride = channels * (this.width + side - 1);
    const patches = new Float32Array(centers.length * channels * side * side);
    let i = 0;
    for (const center of centers) {
      const start = Math.floor(center / this.width) * stride + (center % this.width) * channels;
      for (let row = start; row < start + side * stride; row += stride)
        for (let j = row; j < row + side * channels; j++) patches[i++] = pixels[j];
    }
    return patches;
  }

  private meanOf(patches: Float32Array, start: number, channel: number): number {
    const pixels = (2 * this.settings.radius + 1) ** 2;
    let sum = 0;
    for (let i = 0; i < pixels; i++) sum += patches[start + i * this.image.channels + channel];
    return sum / pixels;
  }

  /** What patches are compared by, `[pixels, features]`; mean colours, components and so on are in these columns. */
  private async features(image: Planes, pixels: Int32Array, columns: Uint8Array): Promise<Float32Array<ArrayBuffer>> {
    const { components, radius } = this.settings;
    const [size, area] = [columns.length, this.height * this.width];
    const one = new Float32Array(size);
    const { guide } = this;
    const [mean, color, down, across] = this.weights;
    const padded = interleave(image, radius);
    const result = new Float32Array(pixels.length * size);
    for (let start = 0; start < pixels.length; start += BLOCK) {
      const part = pixels.subarray(start, start + BLOCK);
      const patches = this.readPatches(padded, part);
      const shape = { rows: part.length, inner: patches.length / part.length, columns: components };
      const products = await this.tools.multiply(patches, this.basis, shape);
      for (let i = 0; i < part.length; i++) {
        const at = (start + i) * size;
        for (let j = 0; j < 3; j++) one[j] = mean * this.meanOf(patches, i * shape.inner, j);
        for (let j = 0; j < components; j++) one[3 + j] = products[i * components + j];
        for (let j = 0; j < guide.channels; j++) one[components + 5 + j] = color * guide.data[j * area + part[i]];
        one[components + 3] = down * Math.floor(part[i] / this.width);
        one[components + 4] = across * (part[i] % this.width);
        for (let j = 0; j < size; j++) result[at + columns[j]] = one[j];
      }
    }
    return result;
  }

  /** The squared distance of a query's features to a source's, if it is below a limit; else something above that. */
  private compare(features: Float32Array, query: number, row: number, limit: number): number {
    const size = this.columns.length;
    const { sourceFeatures } = this;
    let sum = 0;
    for (let i = query * size, j = row * size, end = i + size; i < end && sum < limit; i += 4, j += 4) {
      const a = features[i] - sourceFeatures[j];
      const b = features[i + 1] - sourceFeatures[j + 1];
      const c = features[i + 2] - sourceFeatures[j + 2];
      const d = features[i + 3] - sourceFeatures[j + 3];
      sum += a * a + b * b + c * c + d * d;
    }
    return sum;
  }

  /** Finds for each patch of the estimate that touches the hole one like it outside. */
  async search(estimate: Planes): Promise<void> {
    const features = await this.features(estimate, this.queries, this.columns);
    for (let query = 0; query < this.queries.length; query++)
      this.distance[query] = this.compare(features, query, this.rows[this.match[query]], Infinity);
    if (this.isExact) this.searchAll(features);
    else
      for (let round = 0; round < 2; round++) {
        this.propagate(features);
        this.draw(features);
      }
    const size = this.columns.length;
    const most = this.settings.shift;
    for (let query = 0; query < this.queries.length; query++) {
      const source = this.rows[this.match[query]] * size;
      for (let j = 0; j < 3; j++) {
        const column = this.columns[j];
        const difference = (features[query * size + column] - this.sourceFeatures[source + column]) / this.weights[0];
        this.shift[3 * query + j] = Math.min(Math.max(difference, -most), most);
      }
    }
  }

  private searchAll(features: Float32Array): void {
    const { sourceFeatures, sources, rows } = this;
    const size = this.columns.length;
    const pixels = new Int32Array(sources.length);
    for (const pixel of sources) pixels[rows[pixel]] = pixel;
    for (let query = 0; query < this.queries.length; query++) {
      // What the neighbours have just found is mostly so near already that the rest is soon ruled out.
      for (const delta of [-1, -this.width]) {
        const neighbour = this.index[Math.max(this.queries[query] + delta, 0)];
        if (neighbour >= 0) this.improve(features, query, this.match[neighbour] - delta);
      }
      const first = features[query * size];
      let [low, high] = [0, sources.length];
      while (low < high) {
        const middle = (low + high) >> 1;
        if (sourceFeatures[middle * size] < first) low = middle + 1;
        else high = middle;
      }
      let best = this.distance[query];
      let found = -1;
      for (const step of [1, -1])
        for (let row = step > 0 ? low : low - 1; row >= 0 && row < sources.length; row += step) {
          const apart = sourceFeatures[row * size] - first;
          if (apart * apart >= best) break;
          const distance = this.compare(features, query, row, best);
          if (distance < best) [best, found] = [distance, row];
        }
      if (found >= 0) [this.match[query], this.distance[query]] = [pixels[found], best];
    }
  }

  private improve(features: Float32Array, query: number, candidate: number): void {
    candidate = Math.min(Math.max(candidate, 0), this.valid.length - 1);
    if (candidate === this.match[query] || !this.valid[candidate]) return;
    const distance = this.compare(features, query, this.rows[candidate], this.distance[query]);
    if (distance < this.distance[query]) [this.match[query], this.distance[query]] = [candidate, distance];
  }

  /** Tries what the neighbours copy, shifted. */
  private propagate(features: Float32Array): void {
    for (const delta of [1, -1, this.width, -this.width]) {
      const before = this.match.slice();
      for (let query = 0; query < this.queries.length; query++) {
        const neighbour = this.index[Math.min(Math.max(this.queries[query] + delta, 0), this.index.length - 1)];
        if (neighbour >= 0) this.improve(features, query, before[neighbour] - delta);
      }
    }
  }

  /** Tries random places around the match, ever closer to it. */
  private draw(features: Float32Array): void {
    const { height, width } = this;
    const total = this.queries.length;
    for (let reach = Math.max(height, width) / 2; reach >= 1; reach *= 0.35) {
      const draws = this.tools.random.uniform(2 * total);
      const scale = Math.fround(reach);
      for (let query = 0; query < total; query++) {
        const down = roundHalfEven(Math.fround(scale * (2 * draws[query] - 1)));
        const right = roundHalfEven(Math.fround(scale * (2 * draws[total + query] - 1)));
        const row = Math.min(Math.max(Math.floor(this.match[query] / width) + down, 0), height - 1);
        const column = Math.min(Math.max((this.match[query] % width) + right, 0), width - 1);
        this.improve(features, query, row * width + column);
      }
    }
  }

  /**
   * The picture with its hole filled by the mean of all patches over each pixel, weighted by how well they fit; with
   * `copy` by the one that fits best.
   */
  vote(copy = false): Planes {
    const { height, width, distance, index, match, shift } = this;
    const { radius, spread } = this.settings;
    const { channels } = this.image;
    const area = height * width;
    const every = Math.floor(distance.length / 10_000) + 1;
    const ordinary = Math.max(upperQuartile(distance.filter((_, i) => i % every === 0)), 1e-8);
    const weights = distance.map((value, i) => Math.exp(-value / (spread * ordinary)) * this.trust[i] + 1e-12);
    const colors = interleave(this.image, 0);
    const result = { ...this.image, data: this.image.data.slice() };
    const total = new Float64Array(channels);
    for (let y = 0, pixel = 0; y < height; y++)
      for (let x = 0; x < width; x++, pixel++) {
        if (!this.hole.data[pixel]) continue;
        total.fill(0);
        let sum = 0;
        for (let down = -radius; down <= radius; down++)
          for (let right = -radius; right <= radius; right++) {
            const isInside = y >= down && y - down < height && x >= right && x - right < width;
            const delta = isInside ? down * width + right : 0;
            const query = index[pixel - delta];
            const weight = weights[query];
            const from = (match[query] + delta) * channels;
            if (copy) {
              if (weight <= sum) continue;
              total.fill(0);
              sum = 0;
            }
            sum += weight;
            for (let channel = 0; channel < channels; channel++) total[channel] += weight * colors[from + channel];
            for (let channel = 0; channel < 3; channel++) total[channel] += weight * shift[3 * query + channel];
          }
        for (let channel = 0; channel < channels; channel++) result.data[channel * area + pixel] = total[channel] / sum;
      }
    return result;
  }

  /** Takes over the matches of the next coarser scale. */
  adopt(coarse: Scale): void {
    const { height, width } = this;
    this.queries.forEach((pixel, query) => {
      const [y, x] = [Math.floor(pixel / width), pixel % width];
      const place = coarse.index[(y >> 1) * coarse.width + (x >> 1)];
      if (place < 0) return;
      const match = coarse.match[place];
      const row = Math.min(2 * Math.floor(match / coarse.width) + (y % 2), height - 1);
      const column = Math.min(2 * (match % coarse.width) + (x % 2), width - 1);
      if (this.valid[row * width + column]) this.match[query] = row * width + column;
      this.distance[query] = coarse.distance[place];
      this.shift.set(coarse.shift.subarray(3 * place, 3 * place + 3), 3 * query);
    });
  }
}

function indices(mask: Uint8Array): Int32Array {
  const result = new Int32Array(mask.reduce((sum, value) => sum + value, 0));
  for (let i = 0, n = 0; i < mask.length; i++) if (mask[i]) result[n++] = i;
  return result;
}

/** Standard deviation of the known colours, the mean of the three channels. */
function contrastOf(image: Planes, hole: Mask): number {
  const size = hole.data.length;
  const known = size - count(hole);
  let contrast = 0;
  for (let channel = 0; channel < 3; channel++) {
    let [mean, squares] = [0, 0];
    for (let i = 0; i < size; i++) if (!hole.data[i]) mean += image.data[channel * size + i] / known;
    for (let i = 0; i < size; i++) if (!hole.data[i]) squares += (image.data[channel * size + i] - mean) ** 2;
    contrast += Math.sqrt(squares / (known - 1)) / 3;
  }
  return contrast;
}

/** How much each column varies. */
function variances(rows: Float32Array, columns: number): Float64Array {
  const [sums, squares] = [new Float64Array(columns), new Float64Array(columns)];
  for (let i = 0; i < rows.length; i++) {
    sums[i % columns] += rows[i];
    squares[i % columns] += rows[i] ** 2;
  }
  const count = rows.length / columns;
  return squares.map((square, i) => square / count - (sums[i] / count) ** 2);
}

function upperQuartile(values: Float32Array): number {
  values.sort();
  const position = 0.75 * (values.length - 1);
  const low = Math.floor(position);
  return values[low] + (position - low) * (values[Math.min(low + 1, values.length - 1)] - values[low]);
}

/** Whether the next coarser scale is of use: the hole is thick, and enough is left around it. */
function isDivisible(hole: Mask, source: Mask, { thin, searchPixels, radius }: Settings): boolean {
  const isThin = !erodeMask(hole, thin).data.includes(1);
  if (Math.min(hole.height, hole.width) < 48 || (isThin && hole.data.length <= searchPixels)) return false;
  const small = threshold(halve(asPlanes(without(source, hole))), isMost);
  const queries = count(dilateMask(invert(small), radius));
  return count(shrink(small, radius)) >= Math.max(256, Math.floor(queries / 2));
}

/**
 * Fills a hole with patches of the picture around it, from coarse to fine.
 *
 * @param image colours in [0, 1]; what is in the hole is not looked at
 * @param source the pixels that may be copied; at least one whole patch
 * @param guide a filling to start from
 * @param lead weight of the guide's low frequencies against the patches' own colours, or what is to be matched instead
 *   of them, already weighted
 * @param copy whether the result is copied pixel by pixel instead of averaged
 */
export async function fillWithPatches(
  image: Planes,
  hole: Mask,
  source: Mask,
  guide: Planes,
  lead: number | Planes,
  tools: Tools,
  settings: Settings = SETTINGS,
  copy = false,
): Promise<Planes> {
  const size = hole.data.length;
  guide = { ...guide, data: guide.data.map((value, i) => (hole.data[i % size] ? value : image.data[i])) };
  let low = lead as Planes;
  if (typeof lead === 'number') {
    low = blur(guide, settings.leadSigma);
    for (let i = 0; i < low.data.length; i++) low.data[i] *= Math.sqrt(lead);
  }
  if (settings.texture) {
    const rough = roughness(image, invert(hole)).data.map((value) => settings.texture * value);
    const withRough = planes(5, hole.height, hole.width);
    withRough.data.set(image.data);
    withRough.data.set(rough, 3 * size);
    image = withRough;
  }
  const levels = [{ image, hole, source, guide, low }];
  for (let last = levels[0]; isDivisible(last.hole, last.source, settings); last = levels[levels.length - 1]) {
    const { small, share } = halveKnown(last.image, invert(last.hole));
    levels.push({
      image: small,
      hole: threshold(share, (value) => !isMost(value)),
      source: threshold(halve(asPlanes(last.source)), isMost),
      guide: halve(last.guide),
      low: halve(last.low),
    });
  }

  const [fine, most] = settings.iterations;
  const rounds = (level: number) => roundHalfEven(fine + ((most - fine) * level) / Math.max(levels.length - 1, 1));
  let work = 0;
  for (const [level, { hole }] of levels.entries())
    if (hole.data.length <= settings.searchPixels || level === levels.length - 1) work += count(hole) * rounds(level);
  let done = 0;
  let scale: Scale | null = null;
  for (let level = levels.length - 1; level >= 0; level--) {
    const one = levels[level];
    const coarse: Scale | null = scale;
    // Coarse scales decide what stands where, so that their colours are taken as they are.
    const local = { ...settings, around: settings.around / 2 ** level, ...(level < 2 ? {} : { mean: 1, shift: 0 }) };
    scale = new Scale(one.image, one.hole, one.source, one.low, local, tools);
    let estimate: Planes | null = null;
    if (coarse === null) {
      estimate = fillHole(scale.image, one.hole);
      estimate.data.set(one.guide.data);
    } else {
      scale.adopt(coarse);
      if (one.hole.data.length > settings.searchPixels) continue;
    }
    await scale.prepare();
    for (let round = 0; round < rounds(level); round++) {
      await scale.search(estimate ?? scale.vote());
      estimate = null;
      tools.onWork?.((done += count(one.hole)) / work);
    }
  }
  return firstChannels(scale!.vote(copy), 3);
}

function firstChannels(image: Planes, channels: number): Planes {
  return { ...image, channels, data: image.data.subarray(0, channels * image.height * image.width) };
}
