/** Which steps run with guidance. */

/** Whether a step lies, as a whole, in the interval of guidance. */
export function isGuided(index: number, steps: number, scale: number, start: number, end = 1): boolean {
  return scale > 1 && index / steps >= start && (index + 1) / steps <= end;
}

/** The two branches put together: away from the foreground, towards the background. */
export function guide(foreground: Float32Array, background: Float32Array, scale: number): Float32Array {
  return foreground.map((value, i) => value + scale * (background[i] - value));
}
