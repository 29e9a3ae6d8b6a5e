import numpy as np
from hypothesis import strategies as st
from PIL import Image

from diffusers_moebius.pictures.picture import Picture


def sizes(low=1, high=70):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def masks(draw, low=1, high=70):
    """Masks of a few boxes, which often touch the borders; never empty."""
    height, width = draw(sizes(low, high))
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
        mask[top:bottom, left:right] = True
    return mask


def noise_image(mode, height=24, width=20, seed=0):
    """A Pillow picture of random samples in any mode that the package accepts."""
    random = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width)).astype(np.uint16))
    if mode == "I;16B":
        values = random.integers(0, 65536, (height, width)).astype(">u2")
        return Image.frombytes("I;16B", (width, height), values.tobytes())
    if mode == "I":
        return Image.fromarray(random.integers(0, 65536, (height, width)).astype(np.int32))
    if mode == "F":
        return Image.fromarray(random.random((height, width), np.float32))
    channels = len(Image.new(mode, (1, 1)).getbands())
    if mode == "1":
        return Image.fromarray(random.integers(0, 2, (height, width)).astype(bool))
    data = random.integers(0, 256, (height, width, channels)).astype(np.uint8)
    image = Image.frombytes(mode, (width, height), data.tobytes())
    if mode in ("P", "PA"):
        image.putpalette(random.integers(0, 256, 768).astype(np.uint8).tobytes())
    return image


@st.composite
def pictures(draw):
    mask = draw(masks(16, 60))
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]))
    color = draw(st.sampled_from(["L", "RGB", "CMYK"]))
    shape = (*mask.shape, {"L": 1, "RGB": 3, "CMYK": 4}[color])
    random = np.random.default_rng(draw(st.integers(0, 9)))
    samples = random.random(shape)
    if np.issubdtype(dtype, np.integer):
        samples = np.rint(samples * np.iinfo(dtype).max)
    alpha = samples[..., :1].astype(dtype) if draw(st.booleans()) and color != "CMYK" else None
    return Picture(samples.astype(dtype), color, alpha), mask
