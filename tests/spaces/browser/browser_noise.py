"""The noise of the browser's page, drawn with NumPy."""

import numpy as np


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def browser_noise(seed: int, count: int, start: int = 0) -> np.ndarray:
    """Numbers `start` to `start + count` of a seed, standard normal, float32."""
    key = _mix(np.array([seed], np.uint32) ^ np.uint32(0x9E3779B9))
    bits = _mix(_mix(np.arange(2 * start, 2 * (start + count), dtype=np.uint32)) + key).astype(np.float64)
    radius = np.sqrt(-2 * np.log((bits[::2] + 1) / 2**32))
    return (radius * np.cos(2 * np.pi * bits[1::2] / 2**32)).astype(np.float32)
