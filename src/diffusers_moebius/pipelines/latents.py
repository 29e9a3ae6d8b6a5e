"""Between pictures and the latents that the denoiser works on, for inference and training alike."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from ..pictures.region import Region, fill_hole

# Pipelines may share a VAE, so the lock that guards its precision belongs to no pipeline.
_PRECISION_LOCK = threading.Lock()


@contextmanager
def _precision(vae: AutoencoderKL | AutoencoderTiny, device: torch.device) -> Iterator[torch.dtype]:
    """Runs the VAE outside autocast and, where float16 would overflow (`force_upcast`), in float32."""
    with torch.autocast(device.type, enabled=False):
        if not vae.config.get("force_upcast", False):
            yield vae.dtype
            return
        with _PRECISION_LOCK:
            dtype = vae.dtype
            if dtype == torch.float16:
                vae.to(torch.float32)
                try:
                    yield torch.float32
                finally:
                    vae.to(torch.float16)
                return
        yield dtype


def scale_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """The VAE's own latents as those of the denoiser: shifted by `shift_factor`, times `scaling_factor`."""
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def unscale_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of [`scale_latents`]."""
    return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)


def encode_latents(
    vae: AutoencoderKL | AutoencoderTiny,
    image: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    samples_per_image: int = 1,
) -> torch.Tensor:
    """
    Encodes pictures to scaled latents, by a sample of the posterior where the VAE has one.

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`]): The autoencoder.
        image (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1], on the device that is to compute.
        generator (`torch.Generator` or a list of `B * samples_per_image`, *optional*): Source of the samples.
        samples_per_image (`int`, defaults to 1): Samples a picture; they follow each other in the output.

    Returns:
        `torch.Tensor` of shape `[B * samples_per_image, 4, H / 8, W / 8]`, float32.
    """
    with _precision(vae, image.device) as dtype:
        encoded = vae.encode(image.to(dtype))
    if hasattr(encoded, "latent_dist"):
        parameters = encoded.latent_dist.parameters.float().repeat_interleave(samples_per_image, dim=0)
        latents = DiagonalGaussianDistribution(parameters).sample(generator)
    else:
        latents = encoded.latents.float().repeat_interleave(samples_per_image, dim=0)
    return scale_latents(vae, latents)


def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """
    Decodes scaled latents to pictures.

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`]): The autoencoder.
        latents (`torch.Tensor` of shape `[B, 4, h, w]`): Scaled latents.

    Returns:
        `torch.Tensor` of shape `[B, 3, 8 * h, 8 * w]`, float32, about [-1, 1] but not clamped.
    """
    with _precision(vae, latents.device) as dtype:
        return vae.decode(unscale_latents(vae, latents).to(dtype), return_dict=False)[0].float()


def decode_pictures(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """
    Decodes the latents of a result to pictures `[B, 3, H, W]`, float32 in [0, 1].

    Raises:
        ValueError: If they decode to values that are not finite.
    """
    image = decode_latents(vae, latents)
    if not image.isfinite().all():
        raise ValueError(
            "The result holds NaN or infinite values. Check `latents` and `masked_image_latents`, or load the "
            "pipeline with `dtype` float32 or bfloat16 instead of float16."
        )
    return (image / 2 + 0.5).clamp(0, 1)


def stack_regions(regions: list[Region], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `[B, 3, H, W]` in [-1, 1] and masks `[B, 1, H, W]` of regions that work at one size."""
    image, mask = (torch.cat(tensors) for tensors in zip(*(region.tensors() for region in regions)))
    return image.to(device), mask.to(device)


def select_latents(
    latents: torch.Tensor | list[torch.Tensor] | None, rows: Iterable[int], device: torch.device
) -> torch.Tensor | None:
    """The rows of latents that a caller gave, as one batch in float32; `None` if there are none."""
    return None if latents is None else torch.stack([latents[row] for row in rows]).to(device, torch.float32)


def encode_pictures(
    vae: AutoencoderKL | AutoencoderTiny,
    image: torch.Tensor,
    mask: torch.Tensor,
    latents: torch.Tensor | None,
    masked_image_latents: torch.Tensor | None,
    strength: float,
    masked_content: str,
    generator: torch.Generator | list[torch.Generator] | None,
    samples_per_image: int = 1,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """
    What the denoiser is told of pictures with holes; latents that were given are not computed.

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`]): The autoencoder.
        image (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1].
        mask (`torch.Tensor` of shape `[B, 1, H, W]`): 1 is filled.
        latents (`torch.Tensor`, *optional*): Latents to start from, if they were given.
        masked_image_latents (`torch.Tensor`, *optional*): Latents of the masked pictures, if they were given.
        strength (`float`): Below 1 the start is the noised pictures.
        masked_content (`str`): With `"fill"` their holes are filled first ([`fill_hole`]).
        generator (`torch.Generator` or a list of them, *optional*): Source of the samples.
        samples_per_image (`int`, defaults to 1): Results a picture.

    Returns:
        `tuple`: Latents of the pictures to start from (`None` if not needed), latents of the masked pictures, and
        masks in latent size, one a result.
    """
    image_latents = None
    if latents is None and strength < 1:
        start = fill_hole(image, mask) if masked_content == "fill" else image
        image_latents = encode_latents(vae, start, generator, samples_per_image)
    if masked_image_latents is None:
        masked_image_latents = encode_latents(vae, image * (1 - mask), generator, samples_per_image)
    mask = F.interpolate(mask, size=masked_image_latents.shape[2:], mode="nearest")
    return image_latents, masked_image_latents, mask.repeat_interleave(samples_per_image, dim=0)


def prepare_noise(
    shape: tuple[int, ...],
    noise_offset: float,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """Gaussian noise and, scaled by `noise_offset`, one more draw that is constant over each channel."""
    noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if noise_offset:
        noise = noise + noise_offset * randn_tensor((*shape[:2], 1, 1), generator, device, torch.float32)
    return noise


def prepare_latents(
    latents: torch.Tensor | None,
    image_latents: torch.Tensor | None,
    masked_image_latents: torch.Tensor,
    mask: torch.Tensor,
    scheduler,
    timestep: torch.Tensor,
    noise_offset: float,
    masked_content: str,
    generator: torch.Generator | list[torch.Generator] | None,
) -> torch.Tensor:
    """
    The latents to start from: those given, the noised latents of pictures, or pure noise.

    Args:
        latents (`torch.Tensor` of shape `[B, 4, h, w]`, *optional*): Given ones, used as they are.
        image_latents (`torch.Tensor` of shape `[B, 4, h, w]`, *optional*): Latents of pictures to start from.
        masked_image_latents (`torch.Tensor` of shape `[B, 4, h, w]`): Latents of the masked pictures.
        mask (`torch.Tensor` of shape `[B, 1, h, w]`): 1 is filled.
        scheduler ([`SchedulerMixin`]): Scheduler with its timesteps set.
        timestep (`torch.Tensor`): The first timestep.
        noise_offset (`float`): See [`prepare_noise`].
        masked_content (`str`): With `"noise"` the holes of `image_latents` are noise before they are noised.
        generator (`torch.Generator` or a list of them, *optional*): Source of the noise.

    Returns:
        `torch.Tensor` of shape `[B, 4, h, w]`, float32.
    """
    if latents is not None:
        return latents
    shape = masked_image_latents.shape
    noise = prepare_noise(shape, noise_offset, generator, mask.device)
    if image_latents is None:
        return noise * scheduler.init_noise_sigma
    if masked_content == "noise":
        image_latents = torch.where(mask > 0, prepare_noise(shape, 0.0, generator, mask.device), image_latents)
    return scheduler.add_noise(image_latents, noise, timestep.expand(len(noise)))


def predicted_clean_latents(
    prediction: torch.Tensor,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str = "epsilon",
) -> torch.Tensor:
    """
    The clean latents that a prediction implies.

    Args:
        prediction (`torch.Tensor` of shape `[B, C, H, W]`): Output of the denoiser.
        noisy_latents (`torch.Tensor` of shape `[B, C, H, W]`): Its noisy input.
        timesteps (`torch.Tensor` of shape `[B]`): Timesteps of the samples.
        alphas_cumprod (`torch.Tensor` of shape `[T]`): Of the noise schedule.
        prediction_type (`str`, defaults to `"epsilon"`): Or `"v_prediction"`, or `"sample"`.

    Returns:
        `torch.Tensor` of shape `[B, C, H, W]`.
    """
    alpha = alphas_cumprod.to(noisy_latents)[timesteps].view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        return (noisy_latents - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    if prediction_type == "v_prediction":
        return alpha.sqrt() * noisy_latents - (1 - alpha).sqrt() * prediction
    if prediction_type == "sample":
        return prediction
    raise ValueError(f'`prediction_type` must be "epsilon", "v_prediction" or "sample", but is {prediction_type!r}.')
