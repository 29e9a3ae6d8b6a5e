/** How a filling comes back into its photo: exact outside the mask, without a seam along its edge. */

import {
  type Box,
  type Mask,
  type Planes,
  cropMask,
  cropPlanes,
  enlarge,
  halve,
  maskBox,
  planes,
  roundHalfEven,
} from './region';

export type PasteMode = 'exact' | 'seamless';

/** Grows a mask by a square neighbourhood. */
export function dilateMask(mask: Mask, pixels: number): Mask {
  const { height, width } = mask;
  const grow = (source: Uint8Array, target: Uint8Array, start: number, step: number, length: number) => {
    let count = 0;
    for (let i = 0; i < length + pixels; i++) {
      if (i < length) count += source[start + i * step];
      if (i > 2 * pixels) count -= source[start + (i - 2 * pixels - 1) * step];
      if (i >= pixels) target[start + (i - pixels) * step] = count > 0 ? 1 : 0;
    }
  };
  const middle = new Uint8Array(mask.data.length);
  const data = new Uint8Array(mask.data.length);
  for (let y = 0; y < height; y++) grow(mask.data, middle, y * width, 1, width);
  for (let x = 0; x < width; x++) grow(middle, data, x, width, height);
  return { data, height, width };
}

export function invert(mask: Mask): Mask {
  return { ...mask, data: mask.data.map((value) => 1 - value) };
}

/** Shrinks a mask; what lies outside of the picture takes nothing away. */
export function erodeMask(mask: Mask, pixels: number): Mask {
  return invert(dilateMask(invert(mask), pixels));
}

/**
 * How much of the filling each pixel takes: nothing outside the mask, everything inside but for a ramp along its edge,
 * about a sixteenth as wide as the hole is thick and at most 16 px.
 */
export function featherInwards(mask: Mask): Float32Array {
  const weights = new Float32Array(mask.data.length);
  const area = maskBox(mask, 1);
  if (area === null) return weights;
  const hole = cropMask(mask, area);
  const ramp = new Uint8Array(hole.data.length);
  let widest = 0;
  for (const radius of [1, 2, 4, 8, 16]) {
    const core = erodeMask(hole, 8 * radius);
    if (!core.data.includes(1)) break;
    const reach = dilateMask(core, 8 * radius).data;
    for (let i = 0; i < ramp.length; i++) if (reach[i] && hole.data[i]) ramp[i] = radius;
    widest = radius;
  }
  const distance = hole.data.slice(); // to the nearest pixel outside, in steps of a chess king
  let inner = hole;
  for (let step = 0; step < widest; step++) {
    inner = erodeMask(inner, 1);
    for (let i = 0; i < distance.length; i++) distance[i] += inner.data[i];
  }
  for (let y = 0, i = 0; y < hole.height; y++)
    for (let x = 0; x < hole.width; x++, i++)
      weights[(area[1] + y) * mask.width + area[0] + x] = Math.min(distance[i] / (ramp[i] + 1), 1);
  return weights;
}

/**
 * Continues what lies around a hole into it as a membrane that is fixed at the hole's edge (Laplace's equation), by a
 * pyramid from coarse to fine; in a hole without an edge it is 0.
 */
export function membrane(values: Planes, hole: Mask, sweeps = 6): Planes {
  const { channels, height, width } = values;
  const size = height * width;
  const reach = dilateMask(hole, 1).data;
  const share = planes(1, height, width);
  reach.forEach((value, i) => (share.data[i] = value - hole.data[i]));
  const edge: Planes = { ...values, data: values.data.map((value, i) => (share.data[i % size] ? value : 0)) };

  // Values times how much of each pixel is on the edge, and that share.
  const levels: { values: Planes; share: Planes }[] = [{ values: edge, share }];
  for (let last = levels[0]; Math.max(last.share.height, last.share.width) > 1; last = levels[levels.length - 1])
    levels.push({ values: halve(last.values), share: halve(last.share) });
  let filled = planes(channels, 1, 1);
  for (let level = levels.length - 1; level >= 0; level--) filled = relax(levels[level], filled, sweeps, level);
  return { ...values, data: values.data.map((value, i) => (hole.data[i % size] ? filled.data[i] : value)) };
}

function relax(known: { values: Planes; share: Planes }, coarse: Planes, sweeps: number, level: number): Planes {
  const { values, share } = known;
  const { channels, height, width } = values;
  const size = height * width;
  let filled = enlarge(coarse, height, width);
  for (let i = 0; i < filled.data.length; i++)
    if (share.data[i % size] > 0) filled.data[i] = values.data[i] / share.data[i % size];
  let next: Planes = { ...filled, data: filled.data.slice() };
  for (let sweep = 0; sweep < Math.min(sweeps * 2 ** level, 64); sweep++) {
    for (let channel = 0; channel < channels; channel++)
      for (let y = 0; y < height; y++) {
        const row = (channel * height + y) * width;
        const up = y > 0 ? -width : 0; // nothing flows across the borders
        const down = y < height - 1 ? width : 0;
        for (let x = 0; x < width; x++) {
          if (share.data[y * width + x] > 0) continue;
          const i = row + x;
          const sides = filled.data[x > 0 ? i - 1 : i] + filled.data[x < width - 1 ? i + 1 : i];
          next.data[i] = 0.25 * (filled.data[i + up] + filled.data[i + down] + sides);
        }
      }
    [filled, next] = [next, filled];
  }
  return filled;
}

/**
 * Shifts the colours of a filling inside the hole so that it meets the photo at the hole's edge without a step: the
 * difference along the edge goes on into the hole as a membrane.
 */
export function matchEdges(fill: Planes, original: Planes, mask: Mask): Planes {
  const area = maskBox(mask, 1);
  if (area === null) return fill;
  const [left, top, right, bottom] = area;
  const hole = cropMask(mask, area);
  const difference = { ...fill, data: fill.data.map((value, i) => original.data[i] - value) };
  const shift = membrane(cropPlanes(difference, bottom - top, right - left, top, left), hole);
  const result = { ...fill, data: fill.data.slice() };
  for (let channel = 0, i = 0; channel < fill.channels; channel++)
    for (let y = 0, pixel = 0; y < hole.height; y++)
      for (let x = 0; x < hole.width; x++, i++, pixel++)
        if (hole.data[pixel]) result.data[(channel * fill.height + top + y) * fill.width + left + x] += shift.data[i];
  return result;
}

/**
 * The pixels of a box with the filling in place. Outside the mask they are those of the photo.
 *
 * @param pixels RGBA of the whole photo
 * @param fill the decoded picture in the box, in [0, 1]
 * @param mask of the whole photo
 */
export function pasteFill(
  pixels: Uint8ClampedArray,
  fill: Planes,
  original: Planes,
  mask: Mask,
  box: Box,
  mode: PasteMode,
): Uint8ClampedArray<ArrayBuffer> {
  const [left, top, right, bottom] = box;
  const [height, width] = [bottom - top, right - left];
  const area = maskBox(mask, 1)!;
  const weights = mode === 'exact' ? featherInwards(cropMask(mask, area)) : null;
  if (mode === 'seamless') fill = matchEdges(fill, original, cropMask(mask, box));
  const result = new Uint8ClampedArray(4 * height * width);
  for (let y = 0; y < height; y++) {
    const row = 4 * ((top + y) * mask.width + left);
    result.set(pixels.subarray(row, row + 4 * width), 4 * y * width);
    for (let x = 0; x < width; x++) {
      if (!mask.data[(top + y) * mask.width + left + x]) continue;
      const weight = weights ? weights[(top + y - area[1]) * (area[2] - area[0]) + left + x - area[0]] : 1;
      for (let channel = 0; channel < 3; channel++) {
        const i = 4 * (y * width + x) + channel;
        const value = Math.min(Math.max(fill.data[(channel * height + y) * width + x], 0), 1);
        result[i] = roundHalfEven(weight * value * 255 + (1 - weight) * result[i]);
      }
    }
  }
  return result;
}
