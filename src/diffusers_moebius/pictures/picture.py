"""
A photo as the samples that it came with, so that what lies outside the mask can be given back bit by bit.

Samples are 8-bit, 16-bit or float; grey, RGB or CMYK. Boxes are `(left, top, right, bottom)`, as in Pillow.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from PIL import Image

# Rec. 601 luma, the weights of Pillow's own conversion to grey.
LUMA = (0.299, 0.587, 0.114)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# No interpolation of floats from 0 to 1 goes so far below 0, and a photo from -1 to 1 hardly ever stays above it.
_CLEARLY_SIGNED = -0.25


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


def split_batch(value: PipelineImageInput, name: str) -> list:
    """A list of single pictures of what may be one picture, a batch or a list; tensors become channels-last."""
    if isinstance(value, (list, tuple)):
        elements = [split_batch(element, name) for element in value]
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


def read_picture(value: Image.Image | np.ndarray | torch.Tensor, name: str) -> Picture:
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
            `uint16` (0 to 65535) or floats, in one (grey), two (grey, alpha), three (RGB) or four (RGB, alpha)
            channels. Floats are from 0 to 1; or from -1 to 1 if any of the call is below -0.25, which tells the two
            apart for certain (those between -0.25 and 0 are refused). Pillow modes: 1, L, LA, P, PA, RGB, RGBA, CMYK,
            16-bit grey, and F from 0 to 1. A colour key or palette transparency becomes an alpha channel. EXIF
            orientation is not applied.

    Returns:
        `list[Picture]`.
    """
    elements = split_batch(image, "image")
    floats = [element for element in elements if _is_float(element)]
    if any(element.min() < _CLEARLY_SIGNED for element in floats) and all(abs(each).max() <= 1 for each in floats):
        elements = [(element + 1) / 2 if _is_float(element) else element for element in elements]
    return [read_picture(element, "image") for element in elements]


def _is_float(element: Image.Image | np.ndarray | torch.Tensor) -> bool:
    if isinstance(element, torch.Tensor):
        return element.is_floating_point() and element.numel() > 0
    return isinstance(element, np.ndarray) and element.dtype.kind == "f" and element.size > 0


def stack_results(results: list, output_type: str) -> list | np.ndarray | torch.Tensor:
    """The results of a call: arrays, tensors and latents of one shape and type as one, others as the list."""
    if output_type == "pil" or len({(tuple(result.shape), result.dtype) for result in results}) > 1:
        return results
    return np.stack(results) if output_type == "np" else torch.stack(results)
