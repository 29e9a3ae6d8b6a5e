/**
 * Texture from the photo itself: step by step what `pictures/detail.py` of the package does, with the same random
 * numbers. docs/detail.md describes the method.
 */

import { dilateMask, invert, matchEdges, membrane } from './paste';
import {
  ENLARGED,
  type Multiply,
  SETTINGS,
  type Tools,
  asPlanes,
  blur,
  both,
  count,
  fillWithPatches,
  halveKnown,
  isMost,
  shrink,
  threshold,
  without,
} from './patches';
import { TorchGenerator } from './random';
import {
  type Box,
  type Mask,
  type Planes,
  cropMask,
  cropPlanes,
  fillHole,
  halve,
  maskBox,
  planes,
  readBox,
  resize,
  roundHalfEven,
} from './region';

export type DetailMode = 'patches' | 'enlarged' | null;

/** The package's constants; the reasons for them are given there. */
export const CONSTANTS = { RIM: 4, LARGE: 0.2, STRANGE: 0.03, LED: 0.5, UNLED: 0.02, SMOOTH: 0.08 };
const { RIM, LARGE, STRANGE, LED, UNLED, SMOOTH } = CONSTANTS;

/**
 * How well what is known around a hole is rebuilt when it is held out, a ring of 6 px at a size of 128 px: mean squared
 * errors of patches, infinite if nothing is left to copy from, and of a smooth filling.
 */
export async function heldOutErrors(image: Planes, hole: Mask, source: Mask, tools: Tools): Promise<[number, number]> {
  while (Math.max(hole.height, hole.width) > 128) {
    const { small, share } = halveKnown(image, invert(hole));
    source = threshold(halve(asPlanes(source)), isMost);
    [image, hole] = [small, threshold(share, (value) => !isMost(value))];
  }
  const heldOut = dilateMask(hole, 6);
  let ring = without(heldOut, hole);
  const own = both(ring, source);
  if (own.data.includes(1)) ring = own; // not what is left of an object beside its mask
  const size = ring.data.length;
  const error = (filled: Planes) => {
    let sum = 0;
    for (let i = 0; i < 3 * size; i++) if (ring.data[i % size]) sum += (filled.data[i] - image.data[i]) ** 2;
    return sum / (3 * count(ring));
  };
  const smooth = fillHole(image, heldOut);
  const smoothError = error(smooth);
  const rest = without(source, heldOut);
  if (!shrink(rest, SETTINGS.radius).data.includes(1)) return [Infinity, smoothError];
  return [error(await fillWithPatches(image, heldOut, rest, smooth, UNLED, tools)), smoothError];
}

/** Whether a whole thing fits into a hole: somewhere its edge is farther than a sixteenth of the surroundings. */
function isThick(hole: Mask): boolean {
  let share = asPlanes(hole);
  while (Math.max(share.height, share.width) > 128) share = halve(share);
  const known = threshold(share, (value) => value < 0.5);
  return dilateMask(known, Math.floor(Math.max(share.height, share.width) / 16)).data.includes(0);
}

/** How much the model's filling should lead the patches; `null` where it is to stay. */
async function chooseLead(image: Planes, hole: Mask, source: Mask, tools: Tools): Promise<number | null> {
  const [patchError, smoothError] = await heldOutErrors(image, hole, source, tools);
  if (patchError > STRANGE && isThick(hole)) return null;
  const isLarge = count(hole) / hole.data.length >= LARGE;
  return isLarge && Math.min(patchError, smoothError) > 0.005 ? LED : UNLED;
}

/** Standard deviation of the values at which a mask, repeated for each channel, is 0. */
function deviation(values: Float32Array, mask: Uint8Array): number {
  let [number, sum, squares] = [0, 0, 0];
  for (let i = 0; i < values.length; i++) {
    if (mask[i % mask.length]) continue;
    number++;
    sum += values[i];
    squares += values[i] ** 2;
  }
  return Math.sqrt(Math.max(squares - sum ** 2 / number, 0) / (number - 1));
}

/** Adds what enlarging took away, copied from where the photo, reduced and enlarged, looks like the filling. */
async function sharpen(filled: Planes, hole: Mask, source: Mask, enlargement: number, tools: Tools): Promise<Planes> {
  const { height, width } = hole;
  const area = height * width;
  const [rows, columns] = [height, width].map((length) => Math.max(1, roundHalfEven(length / enlargement)));
  const soft = resize(resize(filled, rows, columns), height, width);
  for (let i = 0; i < 3 * area; i++) if (hole.data[i % area]) soft.data[i] = filled.data[i];
  const low = blur(soft, enlargement).data;
  const band = soft.data.map((value, i) => value - low[i]);
  const squares = planes(1, height, width);
  for (let i = 0; i < 3 * area; i++) squares.data[i % area] += band[i] ** 2 / 3;
  const contrast = blur(squares, 1.5 * enlargement).data.map((value) => (value + 0.03 ** 2) ** 0.25);
  let missing: Planes = { ...filled, data: filled.data.map((value, i) => (value - soft.data[i]) / contrast[i % area]) };
  const lead = planes(6, height, width); // the band, and the colours
  lead.data.set(band.map((value, i) => value / contrast[i % area]));
  const spread = Math.max(deviation(lead.data.subarray(0, 3 * area), new Uint8Array(1)), 1e-6);
  const weight = (Math.sqrt(3) * deviation(missing.data, hole.data)) / spread;
  for (let i = 0; i < 3 * area; i++) lead.data[i] *= weight;
  lead.data.set(soft.data, 3 * area);
  const settings = { ...ENLARGED, around: 0.7 * enlargement };
  missing = await fillWithPatches(missing, hole, source, missing, lead, tools, settings, true);
  for (let i = 0; i < 3 * area; i++)
    missing.data[i] = hole.data[i % area] ? (1 - SMOOTH) * contrast[i % area] * missing.data[i] : 0;
  return { ...filled, data: filled.data.map((value, i) => value + missing.data[i]) };
}

/** One hole of a filled picture; without `enlargement` it is decided how much the filling leads. */
async function detailHole(
  filled: Planes,
  hole: Mask,
  unknown: Mask,
  enlargement: number | null,
  tools: Tools,
): Promise<Planes> {
  const source = [invert(dilateMask(unknown, RIM)), invert(unknown)].find(
    (mask) => count(shrink(mask, SETTINGS.radius)) >= 64,
  );
  if (source === undefined) return filled; // the hole is all but the whole picture
  if (enlargement !== null) return sharpen(filled, hole, source, enlargement, tools);
  const lead = await chooseLead(filled, hole, source, { ...tools, onWork: undefined });
  if (lead === null) return filled;
  const guide = lead === LED ? filled : membrane(filled, hole);
  const detailed = await fillWithPatches(filled, hole, source, guide, lead, tools);
  // The guide is right about low frequencies where it differs a little: patches drift. Large differences are things.
  const difference = { ...filled, data: guide.data.map((value, i) => value - detailed.data[i]) };
  const low = blur(difference, Math.max(hole.height, hole.width) / 64).data;
  const size = hole.data.length;
  for (let i = 0; i < size; i++) {
    if (!hole.data[i]) continue;
    const [r, g, b] = [low[i], low[size + i], low[2 * size + i]];
    const weight = Math.exp(-(r * r + g * g + b * b) / (2 * 0.05 ** 2));
    for (let j = i; j < 3 * size; j += size) {
      detailed.data[j] += weight * low[j];
      detailed.data[j] += SMOOTH * (guide.data[j] - detailed.data[j]);
    }
  }
  return detailed;
}

/** Boxes of holes that are farther from each other than about `reach` pixels, each with the mask in a box. */
function holes(mask: Mask, reach: number): { box: Box; read: (box: Box) => Mask }[] {
  const [rows, columns] = [Math.ceil(mask.height / reach), Math.ceil(mask.width / reach)];
  const labels = new Int32Array(rows * columns).fill(-1);
  const block = (y: number, x: number) => Math.floor(y / reach) * columns + Math.floor(x / reach);
  for (let y = 0, i = 0; y < mask.height; y++)
    for (let x = 0; x < mask.width; x++, i++) if (mask.data[i]) labels[block(y, x)] = block(y, x);
  const extent = new Map<number, Box>(); // by label, in blocks
  for (let seed = labels.length - 1; seed >= 0; seed--) {
    if (labels[seed] !== seed) continue;
    // The greatest label is that of all blocks that touch.
    const box: Box = [columns, rows, 0, 0];
    for (const open = [seed]; open.length; ) {
      const place = open.pop()!;
      const [y, x] = [Math.floor(place / columns), place % columns];
      [box[0], box[1]] = [Math.min(box[0], x), Math.min(box[1], y)];
      [box[2], box[3]] = [Math.max(box[2], x + 1), Math.max(box[3], y + 1)];
      for (let row = Math.max(y - 1, 0); row <= Math.min(y + 1, rows - 1); row++)
        for (let column = Math.max(x - 1, 0); column <= Math.min(x + 1, columns - 1); column++) {
          const next = row * columns + column;
          if (labels[next] < 0 || labels[next] === seed) continue;
          labels[next] = seed;
          open.push(next);
        }
    }
    extent.set(seed, box);
  }
  return [...extent].reverse().map(([label, [left, top, right, bottom]]) => {
    const read = (box: Box) => {
      const part = cropMask(mask, box);
      for (let y = 0, i = 0; y < part.height; y++)
        for (let x = 0; x < part.width; x++, i++) if (labels[block(box[1] + y, box[0] + x)] !== label) part.data[i] = 0;
      return part;
    };
    const blocks: Box = [left * reach, top * reach, right * reach, bottom * reach];
    const outer = overlap(blocks, [0, 0, mask.width, mask.height]);
    const inner = maskBox(read(outer))!;
    return { box: [outer[0] + inner[0], outer[1] + inner[1], outer[0] + inner[2], outer[1] + inner[3]], read };
  });
}

function overlap(one: Box, other: Box): Box {
  return [
    Math.max(one[0], other[0]),
    Math.max(one[1], other[1]),
    Math.min(one[2], other[2]),
    Math.min(one[3], other[3]),
  ];
}

/** Copies the marked pixels from one part of a photo to another. */
function copyMarked(from: Planes, fromBox: Box, to: Planes, toBox: Box, marks: Mask, marksBox: Box): void {
  const [left, top, right, bottom] = overlap(overlap(fromBox, toBox), marksBox);
  const at = (box: Box, x: number, y: number) => (y - box[1]) * (box[2] - box[0]) + x - box[0];
  for (let y = top; y < bottom; y++)
    for (let x = left; x < right; x++)
      if (marks.data[at(marksBox, x, y)])
        for (let channel = 0; channel < 3; channel++)
          to.data[channel * to.height * to.width + at(toBox, x, y)] =
            from.data[channel * from.height * from.width + at(fromBox, x, y)];
}

/** The box that patches for a hole come from: as wide as the hole on each side, within limits. */
function surroundings([left, top, right, bottom]: Box, mask: Mask): Box {
  const side = Math.max(right - left, bottom - top);
  const margin = Math.min(Math.max(side, 96), Math.max(Math.floor(side / 4), 256));
  return overlap([left - margin, top - margin, right + margin, bottom + margin], [0, 0, mask.width, mask.height]);
}

/**
 * Gives a filling the texture of its photo, by patches of what surrounds each hole.
 *
 * @param fill the model's filling of the box, in [0, 1]
 * @param pixels RGBA of the whole photo
 * @param mask of the whole photo
 * @param enlargement how many pixels of the photo a side there are for one of the model's
 * @param random one number is drawn from it
 * @param onWork is told of the share that is done
 * @returns the photo's box with its mask filled, or `fill` itself where nothing was to be done
 */
export async function addDetail(
  fill: Planes,
  pixels: Uint8ClampedArray,
  mask: Mask,
  box: Box,
  enlargement: number,
  detail: DetailMode,
  random: TorchGenerator,
  multiply: Multiply,
  onWork: (share: number) => void = () => {},
): Promise<Planes> {
  if (detail === null || !mask.data.includes(1) || !mask.data.includes(0)) return fill;
  if (detail === 'enlarged' && enlargement <= 1) return fill;
  const tools: Tools = { multiply, random: new TorchGenerator(random.integers(2 ** 31, 1)[0]) };
  const part = overlap(maskBox(mask, 1)!, box);
  const [height, width] = [part[3] - part[1], part[2] - part[0]];
  const inside = cropMask(mask, part);
  const own = cropPlanes(fill, height, width, part[1] - box[1], part[0] - box[0]);
  const led = matchEdges(own, readBox(pixels, mask.width, part), inside);
  led.data.forEach((value, i) => (led.data[i] = Math.min(Math.max(value, 0), 1)));
  // Outside the mask it becomes the photo, so that a paste that matches colours finds that they match already.
  const result = readBox(pixels, mask.width, box);
  const parts = holes(mask, Math.max(16, Math.floor(Math.max(mask.height, mask.width) / 64)));
  for (const [i, hole] of parts.entries()) {
    const around = surroundings(hole.box, mask);
    const filled = readBox(pixels, mask.width, around);
    copyMarked(led, part, filled, around, inside, part);
    tools.onWork = (share) => onWork((i + share) / parts.length);
    const [own, unknown] = [hole.read(around), cropMask(mask, around)];
    const detailed = await detailHole(filled, own, unknown, detail === 'enlarged' ? enlargement : null, tools);
    detailed.data.forEach((value, j) => (detailed.data[j] = Math.min(Math.max(value, 0), 1)));
    copyMarked(detailed, around, result, box, own, around);
  }
  return result;
}
