/** What the model sees of a photo: planes of floats, the region around the hole, its working size. */

/** Rows of numbers, one plane a channel: `data[(channel * height + y) * width + x]`. */
export interface Planes {
  data: Float32Array;
  channels: number;
  height: number;
  width: number;
}

/** A mask: 1 is filled. */
export interface Mask {
  data: Uint8Array;
  height: number;
  width: number;
}

/** `[left, top, right, bottom]` */
export type Box = [number, number, number, number];

const MAX_ASPECT_RATIO = 16;

export function planes(channels: number, height: number, width: number): Planes {
  return { data: new Float32Array(channels * height * width), channels, height, width };
}

/** The box of all marked pixels, grown by a margin and cut at the borders; `null` without any. */
export function maskBox(mask: Mask, margin = 0): Box | null {
  const { data, height, width } = mask;
  let [left, top, right, bottom] = [width, -1, -1, -1];
  for (let y = 0; y < height; y++) {
    const row = data.subarray(y * width, (y + 1) * width);
    const first = row.indexOf(1);
    if (first < 0) continue;
    if (top < 0) top = y;
    bottom = y + 1;
    left = Math.min(left, first);
    right = Math.max(right, row.lastIndexOf(1) + 1);
  }
  if (top < 0) return null;
  return [
    Math.max(left - margin, 0),
    Math.max(top - margin, 0),
    Math.min(right + margin, width),
    Math.min(bottom + margin, height),
  ];
}

function widen(start: number, stop: number, length: number, limit: number): [number, number] {
  length = Math.min(length, limit);
  const missing = length - (stop - start);
  if (missing <= 0) return [start, stop];
  start = Math.max(Math.min(start - Math.floor(missing / 2), limit - length), 0);
  return [start, start + length];
}

/** The part of a photo to work on: the mask's box and a margin, neither too small nor too elongated. */
export function cropRegion(mask: Mask, margin: number, minSize: number): Box | null {
  const box = maskBox(mask, margin);
  if (box === null) return null;
  let [left, top, right, bottom] = box;
  const shortest = Math.max(minSize, Math.ceil(Math.max(right - left, bottom - top) / MAX_ASPECT_RATIO));
  [left, right] = widen(left, right, shortest, mask.width);
  [top, bottom] = widen(top, bottom, shortest, mask.height);
  return [left, top, right, bottom];
}

/** Halves to the even neighbour, as NumPy and torch round. */
export function roundHalfEven(x: number): number {
  const r = Math.round(x);
  return r - x === 0.5 && r % 2 !== 0 ? r - 1 : r;
}

/** Height and width at which a region runs through the model, before it is padded. */
export function workingSize(height: number, width: number, native: number): [number, number] {
  const [short, long] = [Math.min(height, width), Math.max(height, width)];
  let scale = 1;
  if (short > 1.25 * native) scale = native / short;
  else if (2 * short < native) scale = Math.max(native / long, 1);
  return [Math.max(roundHalfEven(height * scale), 1), Math.max(roundHalfEven(width * scale), 1)];
}

/** Weights of the antialiased bicubic interpolation along one axis (a = -1/2, as in Pillow and PyTorch). */
function cubicWeights(from: number, to: number): { start: number; weights: Float64Array }[] {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = 2 * stretch;
  return Array.from({ length: to }, (_, i) => {
    const center = scale * (i + 0.5);
    const start = Math.max(Math.trunc(center - support + 0.5), 0);
    const stop = Math.min(Math.trunc(center + support + 0.5), from);
    const weights = new Float64Array(stop - start);
    let sum = 0;
    for (let j = 0; j < weights.length; j++) {
      const x = Math.abs((j + start - center + 0.5) / stretch);
      if (x < 1) weights[j] = (1.5 * x - 2.5) * x * x + 1;
      else if (x < 2) weights[j] = -0.5 * (((x - 5) * x + 8) * x - 4);
      sum += weights[j];
    }
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

/** Resizes by antialiased bicubic interpolation; the result is cut to [0, 1]. */
export function resize(image: Planes, height: number, width: number): Planes {
  if (image.height === height && image.width === width) return image;
  const columns = cubicWeights(image.width, width);
  const middle = planes(image.channels, image.height, width);
  for (let row = 0; row < image.channels * image.height; row++) {
    const offset = row * image.width;
    for (let x = 0; x < width; x++) {
      const { start, weights } = columns[x];
      let sum = 0;
      for (let j = 0; j < weights.length; j++) sum += weights[j] * image.data[offset + start + j];
      middle.data[row * width + x] = sum;
    }
  }
  const rows = cubicWeights(image.height, height);
  const result = planes(image.channels, height, width);
  const line = new Float64Array(width);
  for (let channel = 0; channel < image.channels; channel++) {
    for (let y = 0; y < height; y++) {
      const { start, weights } = rows[y];
      line.fill(0);
      for (let j = 0; j < weights.length; j++) {
        const offset = (channel * image.height + start + j) * width;
        const weight = weights[j];
        for (let x = 0; x < width; x++) line[x] += weight * middle.data[offset + x];
      }
      const offset = (channel * height + y) * width;
      for (let x = 0; x < width; x++) result.data[offset + x] = Math.min(Math.max(line[x], 0), 1);
    }
  }
  return result;
}

/** Resizes a mask such that a new pixel is marked if any that it covers is. */
export function resizeMask(mask: Mask, height: number, width: number): Mask {
  const data = new Uint8Array(height * width);
  for (let y = 0; y < height; y++) {
    const [top, bottom] = [Math.floor((y * mask.height) / height), Math.ceil(((y + 1) * mask.height) / height)];
    for (let x = 0; x < width; x++) {
      const [left, right] = [Math.floor((x * mask.width) / width), Math.ceil(((x + 1) * mask.width) / width)];
      for (let row = top; row < bottom && !data[y * width + x]; row++)
        if (mask.data.subarray(row * mask.width + left, row * mask.width + right).includes(1)) data[y * width + x] = 1;
    }
  }
  return { data, height, width };
}

/** Halves planes; at odd borders a pixel is the mean of what there is. */
export function halve(image: Planes): Planes {
  const [stepY, stepX] = [Math.min(2, image.height), Math.min(2, image.width)];
  const result = planes(image.channels, Math.ceil(image.height / stepY), Math.ceil(image.width / stepX));
  let i = 0;
  for (let channel = 0; channel < image.channels; channel++)
    for (let y = 0; y < result.height; y++)
      for (let x = 0; x < result.width; x++) {
        let [sum, count] = [0, 0];
        for (let row = y * stepY; row < Math.min((y + 1) * stepY, image.height); row++)
          for (let column = x * stepX; column < Math.min((x + 1) * stepX, image.width); column++, count++)
            sum += image.data[(channel * image.height + row) * image.width + column];
        result.data[i++] = sum / count;
      }
  return result;
}

/** Bilinear interpolation, with the corners of the pictures, not of their pixels, on each other. */
export function enlarge(image: Planes, height: number, width: number): Planes {
  const taps = (from: number, to: number) =>
    Array.from({ length: to }, (_, i) => {
      const position = Math.max(((i + 0.5) * from) / to - 0.5, 0);
      const low = Math.min(Math.floor(position), from - 1);
      return { low, high: Math.min(low + 1, from - 1), share: position - low };
    });
  const [rows, columns] = [taps(image.height, height), taps(image.width, width)];
  const result = planes(image.channels, height, width);
  let i = 0;
  for (let channel = 0; channel < image.channels; channel++)
    for (const row of rows) {
      const low = (channel * image.height + row.low) * image.width;
      const high = (channel * image.height + row.high) * image.width;
      for (const column of columns) {
        const above = image.data[low + column.low] * (1 - column.share) + image.data[low + column.high] * column.share;
        const below =
          image.data[high + column.low] * (1 - column.share) + image.data[high + column.high] * column.share;
        result.data[i++] = above * (1 - row.share) + below * row.share;
      }
    }
  return result;
}

/**
 * Fills holes with colours that go over smoothly into those around them: on the way down a pyramid each level averages
 * the known pixels of the finer one, on the way up what is unknown is taken from the coarser one and smoothed.
 */
export function fillHole(image: Planes, hole: Mask, smoothingSteps = 4): Planes {
  const size = hole.data.length;
  const known: Planes = { ...hole, channels: 1, data: Float32Array.from(hole.data, (value) => 1 - value) };
  const colors: Planes = { ...image, data: image.data.map((value, i) => value * known.data[i % size]) };
  const levels = [{ colors, known }];
  for (let last = levels[0]; Math.min(last.known.height, last.known.width) > 1; last = levels[levels.length - 1])
    levels.push({ colors: halve(last.colors), known: halve(last.known) });
  const coarsest = levels.pop()!;
  const mix = (filled: Planes, { colors, known }: (typeof levels)[number]) => {
    const area = known.data.length;
    return { ...filled, data: filled.data.map((value, i) => colors.data[i] + (1 - known.data[i % area]) * value) };
  };
  const shares = coarsest.known.data;
  const means = coarsest.colors.data.map((value, i) => value / Math.max(shares[i % shares.length], 1e-6));
  let filled: Planes = { ...coarsest.colors, data: means };
  for (const level of levels.reverse()) {
    filled = enlarge(filled, level.known.height, level.known.width);
    for (let step = 0; step < smoothingSteps; step++) filled = average3x3(mix(filled, level));
    filled = mix(filled, level);
  }
  return { ...image, data: image.data.map((value, i) => (hole.data[i % size] ? filled.data[i] : value)) };
}

/** Means over 3×3 pixels; at the borders the last ones count twice. */
function average3x3({ data, channels, height, width }: Planes): Planes {
  const rows = planes(channels, height, width);
  const result = planes(channels, height, width);
  for (let row = 0; row < channels * height; row++)
    for (let x = 0, i = row * width; x < width; x++, i++)
      rows.data[i] = data[x > 0 ? i - 1 : i] + data[i] + data[x < width - 1 ? i + 1 : i];
  for (let row = 0, i = 0; row < channels * height; row++) {
    const [up, down] = [row % height > 0 ? -width : 0, row % height < height - 1 ? width : 0];
    for (let x = 0; x < width; x++, i++) result.data[i] = (rows.data[i + up] + rows.data[i] + rows.data[i + down]) / 9;
  }
  return result;
}

/** Where each of `padded` positions is read if `length` of them go on by reflection. */
function reflection(length: number, padded: number): number[] {
  const period = Math.max(2 * (length - 1), 1);
  return Array.from({ length: padded }, (_, i) => {
    const x = i % period;
    return length === 1 ? 0 : x < length ? x : period - x;
  });
}

/** Continues planes by reflection at the bottom and the right, up to a multiple. */
export function padToMultiple(image: Planes, multiple: number): Planes {
  const rows = reflection(image.height, Math.ceil(image.height / multiple) * multiple);
  const columns = reflection(image.width, Math.ceil(image.width / multiple) * multiple);
  const result = planes(image.channels, rows.length, columns.length);
  let i = 0;
  for (let channel = 0; channel < image.channels; channel++)
    for (const y of rows) {
      const offset = (channel * image.height + y) * image.width;
      for (const x of columns) result.data[i++] = image.data[offset + x];
    }
  return result;
}

/** A part of planes, by default the top left corner. */
export function cropPlanes(image: Planes, height: number, width: number, top = 0, left = 0): Planes {
  if (image.height === height && image.width === width) return image;
  const result = planes(image.channels, height, width);
  for (let channel = 0; channel < image.channels; channel++)
    for (let y = 0; y < height; y++) {
      const offset = (channel * image.height + top + y) * image.width + left;
      result.data.set(image.data.subarray(offset, offset + width), (channel * height + y) * width);
    }
  return result;
}

/** The part of a mask in a box. */
export function cropMask(mask: Mask, [left, top, right, bottom]: Box): Mask {
  const [height, width] = [bottom - top, right - left];
  const data = new Uint8Array(height * width);
  for (let y = 0; y < height; y++) {
    const offset = (top + y) * mask.width + left;
    data.set(mask.data.subarray(offset, offset + width), y * width);
  }
  return { data, height, width };
}

/** The colours of a photo's box, in [0, 1]. */
export function readBox(pixels: Uint8ClampedArray, photoWidth: number, [left, top, right, bottom]: Box): Planes {
  const image = planes(3, bottom - top, right - left);
  const size = image.height * image.width;
  for (let y = top, i = 0; y < bottom; y++)
    for (let x = left; x < right; x++, i++)
      for (let channel = 0; channel < 3; channel++)
        image.data[channel * size + i] = pixels[4 * (y * photoWidth + x) + channel] / 255;
  return image;
}
