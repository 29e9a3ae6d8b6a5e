"""Between pictures and the latents that the denoiser works on, for inference and training alike."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

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
