"""
Photos and masks on their way into the pipeline and back: reading, cropping, resizing, feathering and pasting.

A photo is kept as the samples that it came with (8-bit, 16-bit or float; grey, RGB or CMYK), so that what lies outside
the mask can be given back bit by bit. Boxes are `(left, top, right, bottom)` as in Pillow, masks are boolean arrays of
shape `[H, W]` in which `True` means fill.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from PIL import Image, ImageFilter

# Rec. 601 luma, the weights of Pillow's own conversion to grey.
LUMA = (0.299, 0.587, 0.114)
# A working area may be this many times longer than it is wide.
MAX_ASPECT_RATIO = 16
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PASTE_MODES = ("exact", "seamless", "blur", None)
MASKED_CONTENT = ("original", "fill", "noise")


@dataclass
class Picture:
    """
    One photo with its own samples and what is needed to return it in the form in which it came.

    Args:
        samples (`np.ndarray` of shape `[H, W, channels]`): Colour samples, `uint8`, `uint16` or floats in [0, 1].
        color (`str`): `"L"`, `"RGB"` or `"CMYK"`.
        alpha (`np.ndarray` of shape `[H, W, 1]`, *optional*): The alpha channel, in the depth of `samples`.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of the `"np"` and `"pt"` results.
        pil_mode (`str`, *optional*): Pillow mode of the result where `color` and depth leave it open.
        info (`dict`): Pillow metadata that the result carries on: ICC profile, EXIF, resolution.
    """

    samples: np.ndarray
    color: str
    alpha: np.ndarray | None = None
    dtype: torch.dtype = torch.float32
    pil_mode: str | None = None
    info: dict = field(default_factory=dict)

    @property
    def height(self) -> int:
        return self.samples.shape[0]

    @property
    def width(self) -> int:
        return self.samples.shape[1]

    @property
    def peak(self) -> float:
        """The value of white."""
        return {np.uint8: 255, np.uint16: 65535}.get(self.samples.dtype.type, 1)

    def rgb(self, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
        """
        The colours of a box.

        Args:
            box (`tuple[int, int, int, int]`, *optional*): `(left, top, right, bottom)`, by default the whole picture.

        Returns:
            `np.ndarray` of shape `[h, w, 3]`, floats in [0, 1].
        """
        left, top, right, bottom = box or (0, 0, self.width, self.height)
        values = self._floats(self.samples[top:bottom, left:right]) / self.peak
        if self.color == "L":
            return np.repeat(values, 3, axis=2)
        if self.color == "CMYK":
            return (1 - values[..., :3]) * (1 - values[..., 3:])
        return values

    def from_rgb(self, rgb: np.ndarray) -> np.ndarray:
        """
        RGB colours as colours of this picture, not yet rounded to its depth.

        Args:
            rgb (`np.ndarray` of shape `[h, w, 3]`): Floats, [0, 1] being the range that can be shown.

        Returns:
            `np.ndarray` of shape `[h, w, channels]`, floats in units of `samples`.
        """
        if self.color == "L":
            rgb = rgb @ np.asarray(LUMA, rgb.dtype)[:, None]
        elif self.color == "CMYK":  # without black, as Pillow converts
            rgb = np.concatenate([1 - rgb, np.zeros_like(rgb[..., :1])], axis=2)
        return rgb * self.peak

    def render(self, output_type: str, device: torch.device | str = "cpu") -> Image.Image | np.ndarray | torch.Tensor:
        """
        The picture in the form in which the pipeline returns it.

        Args:
            output_type (`str`): `"pil"`, `"np"` (`[H, W, C]`) or `"pt"` (`[C, H, W]`). Arrays and tensors are floats
                in [0, 1] with the channels of the input (grey 1, RGB 3, alpha one more; CMYK comes as RGB). A Pillow
                result has the mode of the input; bilevel comes as `"L"`, palette as `"RGB"` or `"RGBA"`, an array that
                Pillow has no mode for (floats, 16-bit colour) is rounded to 8 bits.
            device (`torch.device`, defaults to the CPU): Where a `"pt"` result goes.
        """
        if output_type == "pil":
            return self._render_pil()
        values = self.rgb() if self.color == "CMYK" else self._floats(self._with_alpha()) / self.peak
        values = torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype)
        if output_type == "pt":
            return values.permute(2, 0, 1).contiguous().to(device)
        return (values.float() if self.dtype == torch.bfloat16 else values).numpy()

    @staticmethod
    def _floats(samples: np.ndarray) -> np.ndarray:
        return samples if samples.dtype == np.float64 else samples.astype(np.float32)

    def _with_alpha(self) -> np.ndarray:
        return self.samples if self.alpha is None else np.concatenate([self.samples, self.alpha], axis=2)

    def _render_pil(self) -> Image.Image:
        values = self._with_alpha()
        if self.pil_mode is not None:  # one channel of more than 8 bits
            image = Image.fromarray(values[..., 0].astype({"I": np.int32, "F": np.float32}[self.pil_mode]))
        elif values.dtype == np.uint16 and values.shape[2] == 1:
            image = Image.fromarray(values[..., 0])
        else:
            if values.dtype != np.uint8:
                values = np.rint(values * (255 / self.peak)).astype(np.uint8)
            mode = self.color if self.alpha is None else self.color + "A"
            height, width, _ = values.shape
            image = Image.frombytes(mode, (width, height), np.ascontiguousarray(values).tobytes())
        image.info.update(self.info)
        return image


def _picture_from_pil(image: Image.Image, name: str) -> Picture:
    mode = image.mode
    info = {key: image.info[key] for key in ("icc_profile", "exif", "dpi") if key in image.info}
    try:
        if mode.startswith("I;16"):
            return Picture(np.asarray(image).astype(np.uint16)[..., None], "L", info=info)
        if mode == "I":
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(
                    f'`{name}` has mode "I" with values from {values.min()} to {values.max()}; allowed are 0 to 65535.'
                )
            return Picture(values.astype(np.uint16)[..., None], "L", pil_mode="I", info=info)
        if mode == "F":
            return replace(_picture_from_array(np.array(image), name), pil_mode="F", info=info)
        if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK"):
            raise ValueError(
                f'`{name}` has the Pillow mode "{mode}", which has no lossless way to RGB and back; convert it to '
                '"RGB" first.'
            )
        if image.has_transparency_data:
            target = "LA" if mode in ("1", "L", "LA", "La") else "RGBA"
        else:
            target = {"1": "L", "L": "L", "CMYK": "CMYK"}.get(mode, "RGB")
        values = np.array(image.convert(target))
    except OSError as error:
        raise ValueError(f"`{name}` cannot be read: {error}") from error
    values = values.reshape(image.height, image.width, -1)
    if target in ("LA", "RGBA"):
        return Picture(values[..., :-1], target[:-1], values[..., -1:], info=info)
    return Picture(values, target, info=info)


def _picture_from_array(values: np.ndarray, name: str, dtype: torch.dtype | None = None) -> Picture:
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or not 1 <= values.shape[2] <= 4:
        raise ValueError(
            f"`{name}` has an element of shape {list(values.shape)}; allowed are [H, W] and one to four channels, "
            "[H, W, C] as a NumPy array, [C, H, W] as a torch tensor."
        )
    if values.dtype in (np.float16, np.float32, np.float64):
        if not np.isfinite(values).all():
            raise ValueError(f"`{name}` holds values that are NaN or infinite; allowed are numbers from 0 to 1.")
        if values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"`{name}` holds floats from {values.min():.4g} to {values.max():.4g}; allowed is the range 0 to 1."
            )
        dtype = dtype or torch.from_numpy(values[:0]).dtype
        values = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
    elif values.dtype in (np.uint8, np.uint16):
        dtype = torch.float32
    else:
        raise ValueError(
            f"`{name}` has the element type {values.dtype}; allowed are uint8 (0 to 255), uint16 (0 to 65535) and "
            "floats (0 to 1)."
        )
    channels = values.shape[2]
    alpha = values[..., -1:] if channels in (2, 4) else None
    color = "L" if channels <= 2 else "RGB"
    return Picture(values[..., : 1 if color == "L" else 3], color, alpha, dtype)


def _split_batch(value: PipelineImageInput, name: str) -> list:
    """A list of single pictures of what may be one picture, a batch or a list; tensors become channels-last."""
    if isinstance(value, (list, tuple)):
        elements = [_split_batch(element, name) for element in value]
        if any(len(element) != 1 for element in elements):
            raise ValueError(f"`{name}` is a list with a batch inside; pass a list of single pictures or one batch.")
        elements = [element[0] for element in elements]
    elif isinstance(value, Image.Image):
        elements = [value]
    elif not isinstance(value, (np.ndarray, torch.Tensor)):
        raise ValueError(
            f"`{name}` is of type {type(value).__name__}; allowed are PIL images, NumPy arrays, torch tensors and "
            "lists of them."
        )
    elif value.ndim not in (2, 3, 4):
        raise ValueError(f"`{name}` has {value.ndim} dimensions; allowed are 2, 3 and 4.")
    else:
        if isinstance(value, torch.Tensor) and (value.ndim == 4 or (value.ndim == 3 and name == "image")):
            value = value.movedim(-3, -1)
            is_batch = value.ndim == 4
        elif value.ndim == 3 and name == "mask_image":  # [B, H, W], but for arrays that end in a channel axis
            is_batch = isinstance(value, torch.Tensor) or value.shape[2] > 4
        else:
            is_batch = value.ndim == 4
        elements = list(value) if is_batch else [value]
    if not elements:
        raise ValueError(f"`{name}` is empty; at least one picture is needed.")
    return elements


def _read(value: Image.Image | np.ndarray | torch.Tensor, name: str) -> Picture:
    if isinstance(value, Image.Image):
        size, read = (value.height, value.width), _picture_from_pil
    else:
        size, read = tuple(value.shape[:2]), _picture_from_array
    if 0 in size:
        raise ValueError(f"`{name}` is empty: its height and width are {size[0]} and {size[1]}.")
    if not isinstance(value, torch.Tensor):
        return read(value, name)
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:  # NumPy has no such type; float32 holds its values
        return read(value.float().numpy(), name, torch.bfloat16)
    return read(value.numpy(), name)


def load_pictures(image: PipelineImageInput) -> list[Picture]:
    """
    Reads the photos of a call.

    Args:
        image: A PIL image, a NumPy array `[H, W]`, `[H, W, C]` or `[B, H, W, C]`, a torch tensor `[H, W]`, `[C, H, W]`
            or `[B, C, H, W]`, or a list of single pictures of any size. Arrays and tensors hold `uint8` (0 to 255),
            `uint16` (0 to 65535) or floats from 0 to 1, in one (grey), two (grey, alpha), three (RGB) or four (RGB,
            alpha) channels. Pillow modes: 1, L, LA, P, PA, RGB, RGBA, CMYK, 16-bit grey, and F from 0 to 1. A colour
            key or palette transparency becomes an alpha channel. EXIF orientation is not applied.

    Returns:
        `list[Picture]`.
    """
    return [_read(element, "image") for element in _split_batch(image, "image")]


def load_masks(mask_image: PipelineImageInput, pictures: list[Picture]) -> list[np.ndarray]:
    """
    Reads the masks of a call and checks them against the photos.

    Args:
        mask_image: One mask for all photos or as many masks as photos, in the forms of [`load_pictures`] or boolean;
            a three-dimensional torch tensor is a batch `[B, H, W]`. A mask with an alpha channel that is not opaque
            everywhere is that alpha channel (opaque = fill, whatever its colour); any other is its brightness (white
            = fill). It must not hold more than two values; the threshold is half of white.
        pictures (`list[Picture]`): The photos.

    Returns:
        `list[np.ndarray]`: One boolean array `[H, W]` a photo.
    """
    elements = _split_batch(mask_image, "mask_image")
    if len(elements) not in (1, len(pictures)):
        raise ValueError(
            f"`mask_image` holds {len(elements)} masks for {len(pictures)} pictures; allowed are one for all or one "
            "each."
        )
    masks = [_read_mask(element) for element in elements]
    masks = masks * len(pictures) if len(masks) == 1 else masks
    for mask, picture in zip(masks, pictures):
        if mask.shape != (picture.height, picture.width):
            raise ValueError(
                f"`mask_image` is {mask.shape[1]}×{mask.shape[0]} px, but its `image` is "
                f"{picture.width}×{picture.height} px; both must have the same size."
            )
    return masks


def mask_values(value: Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    """
    What a mask in one of the forms of [`load_masks`] says of each pixel, before it is taken as black or white.

    Args:
        value (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): One mask.

    Returns:
        `np.ndarray` of shape `[H, W]`: Its alpha if that is not opaque everywhere, else its brightness; floats from 0
        (keep) to 1 (fill).
    """
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        value = value.cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype == bool:
        value = value.astype(np.uint8) * 255
    picture = _read(value, "mask_image")
    if picture.alpha is not None and (picture.alpha < picture.peak).any():
        return picture.alpha[..., 0] / np.float32(picture.peak)
    if picture.color == "L":
        return picture.samples[..., 0] / np.float32(picture.peak)
    return picture.rgb() @ np.asarray(LUMA, np.float32)


def _read_mask(value: Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    values = mask_values(value)
    low, high = values.min(), values.max()
    if not ((values == low) | (values == high)).all():
        raise ValueError(
            f"`mask_image` holds more than two values, from {low:.4g} to {high:.4g} of white; allowed are black and "
            'white. Binarise it first, e.g. `mask.convert("L").point(lambda v: 255 * (v >= 128))`.'
        )
    return values >= 0.5


def dilate_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """
    Grows a mask by a square neighbourhood.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        pixels (`int`): By how much, in every direction.

    Returns:
        `np.ndarray` of shape `[H, W]`.
    """
    window = 2 * pixels + 1
    for _ in range(2):  # along each axis, by windows that double, so that the cost hardly grows with `pixels`
        reach, span = np.pad(mask, ((pixels, pixels), (0, 0))), 1
        while span < window:
            step = min(span, window - span)
            reach = reach[step:] | reach[:-step]
            span += step
        mask = reach.T
    return mask


def mask_box(mask: np.ndarray, margin: int = 0) -> tuple[int, int, int, int]:
    """
    The bounding box of a mask that is not empty, grown by a margin and cut at the picture's borders.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        margin (`int`, defaults to 0): Pixels on every side.

    Returns:
        `tuple[int, int, int, int]`: `(left, top, right, bottom)`.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    return (
        max(int(columns[0]) - margin, 0),
        max(int(rows[0]) - margin, 0),
        min(int(columns[-1]) + 1 + margin, width),
        min(int(rows[-1]) + 1 + margin, height),
    )


def _widen(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """The interval around `[start, stop)` of at least `length`, as far as it fits into `[0, limit)`."""
    length = min(length, limit)
    missing = length - (stop - start)
    if missing <= 0:
        return start, stop
    start = max(min(start - missing // 2, limit - length), 0)
    return start, start + length


def crop_region(mask: np.ndarray, margin: int, min_size: int) -> tuple[int, int, int, int]:
    """
    The part of a picture to work on: the mask's box and a margin.

    A box with a side below `min_size` or more elongated than 16:1 grows to these limits where the picture has room.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask, not empty.
        margin (`int`): Pixels on every side.
        min_size (`int`): Shortest side in pixels.

    Returns:
        `tuple[int, int, int, int]`: `(left, top, right, bottom)`.
    """
    left, top, right, bottom = mask_box(mask, margin)
    shortest = max(min_size, math.ceil(max(right - left, bottom - top) / MAX_ASPECT_RATIO))
    left, right = _widen(left, right, shortest, mask.shape[1])
    top, bottom = _widen(top, bottom, shortest, mask.shape[0])
    return left, top, right, bottom


def working_size(
    height: int, width: int, native: int, target_height: int | None = None, target_width: int | None = None
) -> tuple[int, int]:
    """
    The size at which a picture runs through the model, before it is padded to the model's multiple.

    With a short side from a half to 5/4 of the native size it runs as it is. A larger picture is reduced until its
    short side has the native size. A smaller one is enlarged until its long side has it, and left alone if the long
    side has it already. The aspect ratio changes only if both targets are given.

    Args:
        height (`int`): Height of the picture in pixels.
        width (`int`): Width of the picture in pixels.
        native (`int`): Side of the pictures that the model was trained on, in pixels.
        target_height (`int`, *optional*): Height to work at; alone it keeps the aspect ratio.
        target_width (`int`, *optional*): Width to work at; alone it keeps the aspect ratio.

    Returns:
        `tuple[int, int]`: Height and width in pixels.
    """
    if target_height is not None and target_width is not None:
        return target_height, target_width
    short, long = min(height, width), max(height, width)
    if target_height is not None:
        scale = target_height / height
    elif target_width is not None:
        scale = target_width / width
    elif short > 1.25 * native:
        scale = native / short
    elif 2 * short < native:
        scale = max(native / long, 1)
    else:
        scale = 1
    return max(round(height * scale), 1), max(round(width * scale), 1)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Resizes pictures by antialiased bicubic interpolation.

    Args:
        image (`torch.Tensor` of shape `[B, C, H, W]`): Floats in [0, 1].
        height (`int`): New height in pixels.
        width (`int`): New width in pixels.

    Returns:
        `torch.Tensor` of shape `[B, C, height, width]`, in [0, 1].
    """
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def resize_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Resizes masks such that a new pixel is masked if any pixel that it covers is, so that thin strokes survive.

    Args:
        mask (`torch.Tensor` of shape `[B, 1, H, W]`): Zeros and ones.
        height (`int`): New height in pixels.
        width (`int`): New width in pixels.

    Returns:
        `torch.Tensor` of shape `[B, 1, height, width]`.
    """
    return F.adaptive_max_pool2d(mask, (height, width))


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """
    Continues pictures or masks by reflection at the bottom and the right, up to a multiple.

    Args:
        image (`torch.Tensor` of shape `[B, C, H, W]`): Pictures or masks.
        multiple (`int`): What height and width are to be divisible by.

    Returns:
        `torch.Tensor` of shape `[B, C, H', W']`.
    """
    for dim in (2, 3):
        length = image.shape[dim]
        missing = -length % multiple
        if missing:
            index = np.pad(np.arange(length), (0, missing), mode="reflect" if length > 1 else "edge")
            image = image.index_select(dim, torch.from_numpy(index).to(image.device))
    return image


def fill_hole(image: torch.Tensor, mask: torch.Tensor, smoothing_steps: int = 4) -> torch.Tensor:
    """
    Fills holes with colours that go over smoothly into those around them: the classical pull-push pyramid.

    On the way down each level averages the known pixels of the finer one; on the way up what is unknown is taken from
    the coarser level and smoothed (Gortler et al., "The Lumigraph", 1996, section 3.4).

    Args:
        image (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures; what they have in the holes is not looked at.
        mask (`torch.Tensor` of shape `[B, 1, H, W]`): 1 in the holes, 0 elsewhere. Where all is hole the result is 0.
        smoothing_steps (`int`, defaults to 4): Averages over 3x3 pixels on each level.

    Returns:
        `torch.Tensor` of shape `[B, 3, H, W]`, equal to `image` outside the holes.
    """
    levels = [(image * (1 - mask), 1 - mask)]  # colours times how much of each pixel is known, and that share
    while min(levels[-1][1].shape[2:]) > 1:
        levels.append(tuple(F.avg_pool2d(values, 2, ceil_mode=True) for values in levels[-1]))
    colors, known = levels.pop()
    filled = colors / known.clamp(min=1e-6)
    for colors, known in reversed(levels):
        filled = F.interpolate(filled, known.shape[2:], mode="bilinear", align_corners=False)
        for _ in range(smoothing_steps):
            filled = colors + (1 - known) * filled
            filled = F.avg_pool2d(F.pad(filled, (1, 1, 1, 1), mode="replicate"), 3, 1)
        filled = colors + (1 - known) * filled
    return torch.where(mask > 0, filled, image)


def feather_inwards(mask: np.ndarray) -> np.ndarray:
    """
    How much of the fill each pixel takes: nothing outside the mask, everything inside but for a ramp along its edge.

    The ramp is as wide as the hole allows, about a sixteenth of its local thickness and at most 16 px; where the hole
    is thinner than 17 px there is none. There is none along the borders of the picture either, since a hole that
    touches the border has no edge there.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.

    Returns:
        `np.ndarray` of shape `[H, W]`, float32 in [0, 1].
    """
    weight = np.zeros(mask.shape, np.float32)
    if not mask.any():
        return weight
    # The mask's box and, where the picture goes on, one pixel around it: what lies farther out has no influence.
    left, top, right, bottom = mask_box(mask, 1)
    hole = mask[top:bottom, left:right]
    ramp = np.zeros(hole.shape, np.uint8)
    for radius in (1, 2, 4, 8, 16):
        core = ~dilate_mask(~hole, 8 * radius)
        if not core.any():
            break
        ramp[dilate_mask(core, 8 * radius) & hole] = radius
    distance = hole.astype(np.uint8)  # to the nearest pixel outside, in steps of a chess king
    inner = hole
    for _ in range(int(ramp.max())):
        inner = ~dilate_mask(~inner, 1)
        distance += inner
    weight[top:bottom, left:right] = np.minimum(distance / (ramp + np.float32(1)), 1)
    return weight


def blur_mask(mask: np.ndarray, radius: float = 3) -> np.ndarray:
    """
    The weights of the release's blurred blend: the mask under a Gaussian.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        radius (`float`, defaults to 3): Standard deviation in pixels.

    Returns:
        `np.ndarray` of shape `[H, W]`, float32 in [0, 1].
    """
    image = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image).astype(np.float32) / 255


def compensate_color(
    fill: np.ndarray, original: np.ndarray, mask: np.ndarray, margin: int = 5, gain: float = 1.1
) -> np.ndarray:
    """
    Shifts the colours of a result towards the original's around the hole, as the release does.

    Adds `gain` times the difference of the mean colours, taken over the unmasked part of the mask's box grown by
    `margin`. Where that part is empty nothing changes.

    Args:
        fill (`np.ndarray` of shape `[h, w, 3]`): The decoded picture, floats.
        original (`np.ndarray` of shape `[h, w, 3]`): The original in the same place.
        mask (`np.ndarray` of shape `[h, w]`): Boolean mask, not empty.
        margin (`int`, defaults to 5): Pixels on every side.
        gain (`float`, defaults to 1.1): Factor on the difference.

    Returns:
        `np.ndarray` of shape `[h, w, 3]`; it may leave the range [0, 1].
    """
    left, top, right, bottom = mask_box(mask, margin)
    known = ~mask[top:bottom, left:right]
    if not known.any():
        return fill
    difference = original[top:bottom, left:right][known] - fill[top:bottom, left:right][known]
    return fill + gain * difference.mean(axis=0)


def match_edges(fill: np.ndarray, original: np.ndarray, mask: np.ndarray, sweeps: int = 6) -> np.ndarray:
    """
    Shifts the colours of a result inside the hole so that it meets the original at the hole's edge without a step.

    The difference between the two on the pixels around the hole goes on into it as a membrane that is fixed there
    (Laplace's equation; Pérez et al., "Poisson Image Editing", 2003, section 2) and is added. A pyramid approximates
    it from coarse to fine: exactly along the edge, as smoothly inside. Where the hole touches the border nothing is
    fixed; a hole without an edge stays as it is.

    Args:
        fill (`np.ndarray` of shape `[h, w, 3]`): The decoded picture, floats.
        original (`np.ndarray` of shape `[h, w, 3]`): The original in the same place; what it has in the hole is not
            looked at.
        mask (`np.ndarray` of shape `[h, w]`): Boolean mask, not empty.
        sweeps (`int`, defaults to 6): Averages over the neighbours at full size; each coarser level has twice as many,
            up to 64.

    Returns:
        `np.ndarray` of shape `[h, w, 3]`, equal to `fill` outside the hole; it may leave the range [0, 1].
    """
    left, top, right, bottom = mask_box(mask, 1)
    area = slice(top, bottom), slice(left, right)
    hole = mask[area]
    edge = dilate_mask(hole, 1) & ~hole
    if not edge.any():
        return fill
    difference = np.where(edge[..., None], original[area] - fill[area], 0).astype(np.float32)
    values = torch.from_numpy(difference).permute(2, 0, 1)[None].contiguous()
    levels = [(values, torch.from_numpy(edge.astype(np.float32))[None, None])]  # values times known share, and share
    while max(levels[-1][1].shape[2:]) > 1:
        window = [min(2, length) for length in levels[-1][1].shape[2:]]
        levels.append(tuple(F.avg_pool2d(level, window, ceil_mode=True) for level in levels[-1]))
    values, share = levels.pop()
    membrane = values / share
    for level, (values, share) in reversed(list(enumerate(levels))):
        free = (share == 0).float()
        fixed = values / share.where(share > 0, 1)
        membrane = fixed + free * F.interpolate(membrane, share.shape[2:], mode="bilinear", align_corners=False)
        for _ in range(min(sweeps * 2**level, 64)):
            padded = F.pad(membrane, (1, 1, 1, 1), mode="replicate")  # nothing flows across the borders
            neighbours = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
            neighbours.add_(padded[..., 1:-1, :-2]).add_(padded[..., 1:-1, 2:])
            membrane = torch.addcmul(fixed, neighbours, free, value=0.25)
    result = fill.copy()
    result[area] += np.where(hole[..., None], membrane[0].permute(1, 2, 0).numpy(), 0)
    return result


def paste_fill(
    picture: Picture,
    fill: np.ndarray,
    mask: np.ndarray,
    box: tuple[int, int, int, int],
    paste: str | None = "exact",
    color_compensation: bool = False,
) -> Picture:
    """
    Puts a decoded result into its picture.

    Args:
        picture (`Picture`): The original.
        fill (`np.ndarray` of shape `[h, w, 3]`): The decoded picture in the box, floats in [0, 1].
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask of the whole picture, not empty.
        box (`tuple[int, int, int, int]`): Where `fill` belongs, `(left, top, right, bottom)`.
        paste (`str`, *optional*, defaults to `"exact"`): `"exact"` changes nothing outside the mask and blends inwards
            ([`feather_inwards`]), `"seamless"` changes nothing outside either and moves the colours inside
            ([`match_edges`]), `"blur"` is the release's blend ([`blur_mask`]) with its truncation to the picture's
            depth, `None` takes all of `fill`.
        color_compensation (`bool`, defaults to `False`): Whether [`compensate_color`] comes first.

    Returns:
        `Picture`: A new picture with the alpha channel of the original.
    """
    left, top, right, bottom = box
    depth = picture.samples.dtype
    if paste == "blur" and picture.peak > 1:
        fill = np.floor(fill * picture.peak) / picture.peak
    if color_compensation:
        fill = compensate_color(fill, picture.rgb(box), mask[top:bottom, left:right])
    if paste == "seamless":
        fill = match_edges(fill, picture.rgb(box), mask[top:bottom, left:right]).clip(0, 1)

    original = picture.samples[top:bottom, left:right]
    weights = {"exact": feather_inwards, "seamless": np.float32, "blur": blur_mask, None: np.ones_like}
    weight = weights[paste](mask)
    weight = weight[top:bottom, left:right, None]
    blended = weight * picture.from_rgb(fill) + (1 - weight) * original
    if picture.peak > 1:
        # The nudge keeps a whole number that float arithmetic left just below itself from losing one.
        blended = np.floor(blended + 1e-3) if paste == "blur" else np.rint(blended)
    blended = blended.clip(0, picture.peak).astype(depth)

    samples = picture.samples.copy()
    samples[top:bottom, left:right] = np.where(weight > 0, blended, original)
    return replace(picture, samples=samples)
