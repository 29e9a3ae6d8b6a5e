/** Principal components. */

import { NoiseSource } from './random';

/** More vectors than asked for, by which those that are asked for converge faster, and rounds. */
const SPARE = 16;
const ROUNDS = 14;

/**
 * The eigenvectors of a symmetric matrix `[size, size]` without negative eigenvalues, for the largest ones: rows of the
 * result, the largest first. By subspace iteration and the method of Rayleigh and Ritz.
 */
export function topEigenvectors(matrix: Float32Array, size: number, count: number): Float64Array {
  const block = Math.min(count + SPARE, size);
  const exact = Float64Array.from(matrix);
  let vectors = Float64Array.from(new NoiseSource(0).draw(block * size));
  orthonormalize(vectors, size);
  for (let round = 0; round < ROUNDS; round++) {
    vectors = timesSymmetric(vectors, exact, size);
    orthonormalize(vectors, size);
  }
  const images = timesSymmetric(vectors, exact, size);
  const small = new Float64Array(block * block);
  for (let i = 0; i < block; i++)
    for (let j = 0; j < block; j++)
      for (let k = 0; k < size; k++) small[i * block + j] += vectors[i * size + k] * images[j * size + k];
  const turn = jacobi(small, block);
  const order = Array.from({ length: block }, (_, i) => i).sort((i, j) => small[j * block + j] - small[i * block + i]);
  const result = new Float64Array(count * size);
  for (let row = 0; row < count; row++)
    for (let i = 0; i < block; i++) {
      const share = turn[i * block + order[row]];
      for (let k = 0; k < size; k++) result[row * size + k] += share * vectors[i * size + k];
    }
  return result;
}

/** Each row times a symmetric matrix; four rows at once, which is faster by far. */
function timesSymmetric(rows: Float64Array, matrix: Float64Array, size: number): Float64Array<ArrayBuffer> {
  const result = new Float64Array(rows.length);
  const last = rows.length - size;
  for (let first = 0; first <= last; first += 4 * size) {
    const [second, third, fourth] = [1, 2, 3].map((i) => Math.min(first + i * size, last));
    for (let column = 0, at = 0; column < size; column++) {
      let [a, b, c, d] = [0, 0, 0, 0];
      for (let i = 0; i < size; i++, at++) {
        const value = matrix[at];
        a += value * rows[first + i];
        b += value * rows[second + i];
        c += value * rows[third + i];
        d += value * rows[fourth + i];
      }
      result[first + column] = a;
      result[second + column] = b;
      result[third + column] = c;
      result[fourth + column] = d;
    }
  }
  return result;
}

/** Gram and Schmidt's method, twice, since once is not exact enough; what depends on earlier rows becomes zero. */
function orthonormalize(rows: Float64Array, size: number): void {
  const dot = (a: number, b: number) => {
    let sum = 0;
    for (let k = 0; k < size; k++) sum += rows[a + k] * rows[b + k];
    return sum;
  };
  for (let row = 0; row < rows.length; row += size) {
    const before = dot(row, row);
    for (let pass = 0; pass < 2; pass++)
      for (let other = 0; other < row; other += size) {
        const share = dot(row, other);
        for (let k = 0; k < size; k++) rows[row + k] -= share * rows[other + k];
      }
    const norm = dot(row, row);
    const scale = norm > 1e-20 * before ? 1 / Math.sqrt(norm) : 0;
    for (let k = 0; k < size; k++) rows[row + k] *= scale;
  }
}

/** Turns a symmetric matrix into a diagonal one, in place; the result's columns are its eigenvectors. */
function jacobi(matrix: Float64Array, size: number): Float64Array {
  const turn = new Float64Array(size * size);
  for (let i = 0; i < size; i++) turn[i * size + i] = 1;
  for (let sweep = 0; sweep < 12; sweep++)
    for (let p = 0; p < size - 1; p++)
      for (let q = p + 1; q < size; q++) {
        const apart = matrix[p * size + q];
        const [first, last] = [matrix[p * size + p], matrix[q * size + q]];
        if (apart ** 2 <= 1e-30 * Math.abs(first * last)) continue;
        const ratio = (last - first) / (2 * apart);
        const tangent = (ratio < 0 ? -1 : 1) / (Math.abs(ratio) + Math.hypot(ratio, 1));
        const cosine = 1 / Math.hypot(tangent, 1);
        const sine = tangent * cosine;
        rotate(matrix, size, p, q, size, cosine, sine);
        rotate(matrix, size, p * size, q * size, 1, cosine, sine);
        rotate(turn, size, p, q, size, cosine, sine);
      }
  return turn;
}

/** Turns two rows or columns, which start at `i` and `j`, into each other. */
function rotate(
  values: Float64Array,
  count: number,
  i: number,
  j: number,
  step: number,
  cosine: number,
  sine: number,
): void {
  for (let k = 0; k < count; k++, i += step, j += step) {
    const a = values[i];
    const b = values[j];
    values[i] = cosine * a - sine * b;
    values[j] = sine * a + cosine * b;
  }
}
