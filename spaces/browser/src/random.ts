/** Random numbers that are the same in every browser. */

function mix(x: number): number {
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return (x ^ (x >>> 16)) >>> 0;
}

/** Normal noise that depends on the seed and the position alone. */
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

/** What torch draws on the CPU: the Mersenne Twister (Matsumoto and Nishimura, 1998). */
export class TorchGenerator {
  private readonly state = new Uint32Array(624);
  private position = 624;

  constructor(seed: number) {
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const previous = this.state[i - 1];
      this.state[i] = Math.imul(1812433253, previous ^ (previous >>> 30)) + i;
    }
  }

  private bits(): number {
    const { state } = this;
    if (this.position === 624) {
      for (let i = 0; i < 624; i++) {
        const x = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (x >>> 1) ^ (x & 1 ? 0x9908b0df : 0);
      }
      this.position = 0;
    }
    let x = state[this.position++];
    x ^= x >>> 11;
    x ^= (x << 7) & 0x9d2c5680;
    x ^= (x << 15) & 0xefc60000;
    return (x ^ (x >>> 18)) >>> 0;
  }

  /** `torch.randint(limit, (count,))`, for a limit below 2^28 or a power of two. */
  integers(limit: number, count: number): Uint32Array {
    const values = new Uint32Array(count);
    for (let i = 0; i < count; i++) {
      if (limit >= 2 ** 28) this.bits(); // the upper half of 64 bits
      values[i] = this.bits() % limit;
    }
    return values;
  }

  /** `torch.rand(count)` */
  uniform(count: number): Float32Array {
    const values = new Float32Array(count);
    for (let i = 0; i < count; i++) values[i] = (this.bits() & 0xffffff) / 2 ** 24;
    return values;
  }
}
