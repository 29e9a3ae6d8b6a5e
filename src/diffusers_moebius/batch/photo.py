"""One photo on its way: named, read with its mask, filled."""

import re
import urllib.request
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..pictures.files import ImageMetadata, read_image

if TYPE_CHECKING:
    from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


# That of SDXL's latents, which the published models have: no other autoencoder scales by it.
_SDXL_SCALE = 0.13025


class Item(NamedTuple):
    """
    A photo with its mask, not read yet. Each may be a file, the contents of one, or the address of one.

    Args:
        key (`str`): Its name, unlike that of any other, with a suffix: the path below its folder, as a rule.
        photo (`Path`, `bytes` or `str`): The photo.
        masks (`list`): One mask; more or none is an error of this photo alone.
    """

    key: str
    photo: Path | bytes | str
    masks: list[Path | bytes | str]

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.key if isinstance(self.photo, bytes) else str(self.photo)

    @property
    def mask_name(self) -> str:
        """What messages call its mask."""
        mask = self.masks[0]
        return f"the mask of {self.key}" if isinstance(mask, bytes) else str(mask)


class MaskOptions(NamedTuple):
    """
    How masks are read.

    Args:
        threshold (`float`, defaults to 0.5): As in [`read_mask`].
        source (`str`, defaults to `"auto"`): As in [`read_mask`].
        invert (`bool`, defaults to `False`): As in [`read_mask`].
        resize (`bool`, defaults to `False`): Stretches masks of another aspect ratio than their photo's.
        dilation (`int`, *optional*): Pixels by which masks grow; by default they grow where something is left of an
            object beside them ([`grow_over_rims`]).
    """

    threshold: float = 0.5
    source: str = "auto"
    invert: bool = False
    resize: bool = False
    dilation: int | None = None


class Photo(NamedTuple):
    """
    A photo that has been read.

    Args:
        item (`Item`): Where it comes from.
        image (`PIL.Image.Image`): Its pixels, upright.
        mask (`np.ndarray` of shape `[H, W]`): `True` is filled; grown already.
        metadata (`ImageMetadata`): What its file holds besides.
        remarks (`list[str]`): What its owner may not have meant, in words.
    """

    item: Item
    image: Image.Image
    mask: np.ndarray
    metadata: ImageMetadata
    remarks: list[str]


def read_photo(item: Item, options: MaskOptions) -> Photo:
    """
    Reads a photo and its mask.

    Args:
        item (`Item`): The photo.
        options (`MaskOptions`): How its mask is read.

    Returns:
        `Photo`: What was read.

    Raises:
        ValueError: If one of them cannot be read or they do not fit together; OSError if a file or address cannot be
            opened.
    """
    if len(item.masks) != 1:
        raise ValueError(f"{item.name} must have one mask of the same name, but has {len(item.masks)}.")
    image, metadata = read_image(_contents(item.photo), item.name)
    mask_image, _ = read_image(_contents(item.masks[0]), item.mask_name)

    # They bring torch, which files that are none can do without.
    from ..pictures.mask import dilate_mask, fit_mask, grow_over_rims, read_mask

    try:
        mask, remarks = read_mask(mask_image, options.threshold, options.source, options.invert)
        mask = fit_mask(mask, image.height, image.width, stretch=options.resize)
        # Masks leave out rims and shadows more often than not.
        grown = grow_over_rims(mask, image) if options.dilation is None else dilate_mask(mask, options.dilation)
    except ValueError as error:
        raise ValueError(f"{item.mask_name} with {item.name}: {error}") from error
    remarks = [f"{item.mask_name}: {remark}" for remark in remarks]
    if not mask.any():
        remarks.append(f"{item.mask_name}: nothing is filled, so {item.name} stays as it is")
    return Photo(item, image, grown, metadata, remarks)


def _contents(source: Path | bytes | str) -> Path | bytes:
    if isinstance(source, str) and re.match("https?://", source):
        with urllib.request.urlopen(source, timeout=60) as response:
            return response.read()
    return Path(source) if isinstance(source, str) else source


def prepare_pipeline(pipeline: "MoebiusInpaintPipeline", fast: bool) -> None:
    """
    Makes a pipeline that will only fill photos faster.

    Args:
        pipeline ([`MoebiusInpaintPipeline`]): The pipeline, which is changed; its results stay the same but for
            rounding.
        fast (`bool`): Also few steps and, where the model has SDXL's latents, a tiny decoder: other results.
    """
    from diffusers import AutoencoderKL

    from ..loaders import TINY_AUTOENCODER

    if fast:
        pipeline.use_few_steps()
        if isinstance(pipeline.vae, AutoencoderKL) and abs(pipeline.vae.config.scaling_factor - _SDXL_SCALE) < 1e-6:
            try:
                pipeline.use_tiny_decoder(TINY_AUTOENCODER)
            except (ValueError, OSError) as error:
                warnings.warn(f"the model's own decoder is used, which is slower: {error}", stacklevel=2)
    unet = pipeline.unet
    if hasattr(unet, "fuse_for_inference") and getattr(unet, "hf_quantizer", None) is None:
        pipeline.prepare_for_inference()


def fill_photos(
    pipeline: "MoebiusInpaintPipeline", photos: list[Photo], seed: int, options: dict[str, Any]
) -> list[Image.Image | Exception]:
    """
    Fills photos in one call of a pipeline, each from its own generator, so that none depends on the others.

    Args:
        pipeline ([`MoebiusInpaintPipeline`]): The pipeline.
        photos (`list[Photo]`): The photos. If they cannot be done together, they are done one after another.
        seed (`int`): Seed of each.
        options (`dict`): What else the pipeline's call takes.

    Returns:
        `list[PIL.Image.Image | Exception]`: A picture a photo, or why there is none.
    """
    import torch

    try:
        return pipeline(
            image=[photo.image for photo in photos],
            mask_image=[photo.mask for photo in photos],
            # On the processor, so that a seed means the same picture on every device.
            generator=[torch.Generator().manual_seed(seed) for _ in photos],
            **options,
        ).images
    except (ValueError, torch.OutOfMemoryError) as error:
        if len(photos) > 1:
            return [result for photo in photos for result in fill_photos(pipeline, [photo], seed, options)]
        name = photos[0].item.name
        if isinstance(error, torch.OutOfMemoryError):
            return [ValueError(f"{name} takes more memory than the device has; `--device cpu` may have more.")]
        return [ValueError(f"{name}: {error}")]
