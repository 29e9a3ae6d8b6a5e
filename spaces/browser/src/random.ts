/** Normal noise that depends on the seed and the position alone, so that every browser draws the same picture. */

function mix(x: number): number {
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return (x ^ (x >>> 16)) >>> 0;
}

export class NoiseSource {
  private readonly key: number;
  private position = 0;

  constructor(seed: number) {
    this.key = mix(seed ^ 0x9e3779b9);
  }

  private bits(index: number): number {
    return mix((mix(index) + this.key) | 0);
  }

  /** The next `count` numbers of a standard normal distribution, each from two hashes by Box and Muller's method. */
  draw(count: number): Float32Array {
    const values = new Float32Array(count);
    for (let i = 0; i < count; i++, this.position++) {
      const radius = Math.sqrt(-2 * Math.log((this.bits(2 * this.position) + 1) / 2 ** 32));
      values[i] = radius * Math.cos((2 * Math.PI * this.bits(2 * this.position + 1)) / 2 ** 32);
    }
    return values;
  }
}
