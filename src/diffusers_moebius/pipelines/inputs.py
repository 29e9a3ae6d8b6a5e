"""What a caller may ask for, checked before anything is computed."""

import math
from numbers import Integral

import torch

from ..pictures.detail import DETAIL_MODES
from ..pictures.paste import PASTE_MODES
from ..pictures.picture import OUTPUT_TYPES
from ..pictures.region import MASKED_CONTENT, ModelSizes

_LEAST = {"num_inference_steps": 1, "num_images_per_prompt": 1}
_CHOICES = {
    "masked_content": MASKED_CONTENT,
    "detail": DETAIL_MODES,
    "paste": PASTE_MODES,
    "output_type": OUTPUT_TYPES,
}


def check_options(**options) -> None:
    """Checks options of a call, each by its name, and those together that depend on each other."""
    for name, value in options.items():
        if name in _LEAST and (not isinstance(value, Integral) or value < _LEAST[name]):
            raise ValueError(f"`{name}` must be a whole number of at least {_LEAST[name]}, but is {value}.")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, _CHOICES[name]))}, but is {value!r}.")
        if name == "strength" and not 0 < value <= 1:
            raise ValueError(f"`strength` must be above 0 and at most 1, but is {value}.")
        if name in ("eta", "noise_offset") and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must be a finite number of at least 0, but is {value}.")
        if name == "guidance_scale" and not math.isfinite(value):
            raise ValueError(f"`guidance_scale` must be a finite number, but is {value}.")
    if options.get("masked_content", "original") != "original" and options["strength"] == 1:
        raise ValueError(
            f"`masked_content` {options['masked_content']!r} needs a `strength` below 1, but that is 1, where the "
            "start is pure noise."
        )
    if "guidance_start" in options and not 0 <= options["guidance_start"] <= options["guidance_end"] <= 1:
        raise ValueError(
            "`guidance_start` and `guidance_end` must be fractions with 0 <= start <= end <= 1, but are "
            f"{options['guidance_start']} and {options['guidance_end']}."
        )


def prepare_generator(
    generator: torch.Generator | list[torch.Generator] | None, num_pictures: int, num_images_per_prompt: int
) -> list[torch.Generator] | torch.Generator | None:
    """One generator a result, or the single one (or none) that was given."""
    if generator is None:
        return None
    for each in generator if isinstance(generator, (list, tuple)) else [generator]:
        if not isinstance(each, torch.Generator):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, but is {generator!r}.")
    if isinstance(generator, torch.Generator):
        return generator
    if len(generator) == num_pictures:
        return [each for each in generator for _ in range(num_images_per_prompt)]
    if len(generator) != num_pictures * num_images_per_prompt:
        raise ValueError(
            f"`generator` holds {len(generator)} generators for {num_pictures} pictures with {num_images_per_prompt} "
            "results each; allowed are one a picture or one a result."
        )
    return list(generator)


def check_latents(
    name: str,
    value: torch.Tensor | list[torch.Tensor] | None,
    working_sizes: list[tuple[int, int]],
    channels: int,
    sizes: ModelSizes,
) -> None:
    """Checks that latents were given for each result, of the height and width in pixels at which it works."""
    if value is None:
        return
    if len(value) != len(working_sizes):
        raise ValueError(f"`{name}` holds {len(value)} latents for {len(working_sizes)} results; allowed is one each.")
    for row, (latents, size) in enumerate(zip(value, working_sizes)):
        expected = (channels, *(length // sizes.latent for length in size))
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"`{name}` must have the shape {list(expected)} for result {row}, but has {list(latents.shape)}."
            )


def model_sizes(vae, unet) -> ModelSizes:
    """What an autoencoder and a denoiser ask of the sizes at which they work; either may be missing (`None`)."""
    latent = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    native, levels = (64, 3) if unet is None else (unet.config.sample_size, len(unet.config.block_out_channels))
    return ModelSizes(latent, native * latent, latent * 2 ** (levels - 1))
