"""The steps of denoising: timesteps, tokens of the categories, one prediction, one step of the scheduler."""

import inspect

import torch

from ..models.latent_categories import LatentCategoriesEmbedder
from .inputs import check_options


def set_timesteps(
    scheduler,
    num_inference_steps: int,
    strength: float,
    device: torch.device,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> torch.Tensor:
    """
    Sets the timesteps of a scheduler, and where among them it begins.

    The function of diffusers for this is in a module that imports transformers, which takes seconds.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler, which is changed.
        num_inference_steps (`int`): Number of steps of the whole schedule.
        strength (`float`): Share of the steps that run, the last ones.
        device (`torch.device`): Where the timesteps go.
        timesteps (`list[int]`, *optional*): Custom timesteps, for schedulers that take them.
        sigmas (`list[float]`, *optional*): Custom sigmas, for schedulers that take them.

    Returns:
        `torch.Tensor` of shape `[steps]`: The timesteps to run.
    """
    check_options(num_inference_steps=num_inference_steps, strength=strength)
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if len(given) > 1:
        raise ValueError("Only one of `timesteps` and `sigmas` can be given.")
    for name, value in given.items():
        if len(value) == 0:
            raise ValueError(f"`{name}` is empty; at least one step is needed.")
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"`{name}` cannot be given to a {type(scheduler).__name__}.")
    scheduler.set_timesteps(**(given or {"num_inference_steps": num_inference_steps}), device=device)
    if given:
        num_inference_steps = len(scheduler.timesteps)
    kept = int(num_inference_steps * strength)
    if kept < 1:
        raise ValueError(
            f"`strength` {strength} of {num_inference_steps} `num_inference_steps` leaves no step to run; raise "
            "either (1.0 runs all)."
        )
    begin = (num_inference_steps - kept) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def embed_categories(lcg_embedder: LatentCategoriesEmbedder, batch_size: int, device: torch.device) -> torch.Tensor:
    """The tokens of the guidance, `[2 * batch_size, tokens, dim]`: foreground, then background."""
    categories = [lcg_embedder.category_ids(category, batch_size, device) for category in ("foreground", "background")]
    return lcg_embedder(torch.cat(categories)).embeds


def prepare_model_input(
    scheduler, latents: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor, masked_image_latents: torch.Tensor
) -> torch.Tensor:
    """What the denoiser sees at a step, `[B, 9, h, w]`: noisy latents, mask, latents of the masked pictures."""
    return torch.cat([scheduler.scale_model_input(latents, timestep), mask, masked_image_latents], dim=1)


def predict_noise(
    unet,
    model_input: torch.Tensor,
    timestep: torch.Tensor,
    category_embeds: torch.Tensor,
    attention_kwargs: dict | None = None,
) -> tuple[torch.Tensor, ...]:
    """
    The denoiser's predictions for one or several categories, in one call.

    Args:
        unet ([`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`]): The denoiser.
        model_input (`torch.Tensor` of shape `[B, 9, h, w]`): See [`prepare_model_input`].
        timestep (`torch.Tensor`): The timestep.
        category_embeds (`torch.Tensor` of shape `[k * B, tokens, dim]`): Tokens of `k` categories, one after another.
        attention_kwargs (`dict`, *optional*): Handed to the denoiser: `{"scale": s}` weighs active LoRA adapters.

    Returns:
        `tuple` of `k` `torch.Tensor` of shape `[B, 4, h, w]`, float32.
    """
    count = len(category_embeds) // len(model_input)
    model_input = torch.cat([model_input] * count).to(unet.dtype)
    category_embeds = category_embeds.to(unet.dtype)
    options = {"encoder_hidden_states": category_embeds, "attention_kwargs": attention_kwargs, "return_dict": False}
    prediction = unet(model_input, timestep, **options)[0]
    return prediction.float().chunk(count)


def scheduler_step(
    scheduler,
    noise_pred: torch.Tensor,
    timestep: torch.Tensor,
    latents: torch.Tensor,
    eta: float,
    generator: torch.Generator | list[torch.Generator] | None,
) -> torch.Tensor:
    """The latents after a step; `eta` and `generator` go to schedulers that take them."""
    parameters = inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in parameters}
    return scheduler.step(noise_pred, timestep, latents, **options, return_dict=False)[0]
