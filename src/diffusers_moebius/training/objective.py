"""The diffusion objective of inpainting: noised samples with holes, their targets and weights."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor

from ..pipelines.latents import predicted_clean_latents
from .latent_cache import hole_at_latent_size, mask_to_latent_size


def sample_generators(seed: int, first_sample: int, count: int) -> list[torch.Generator]:
    """
    One generator for each sample of a batch.

    What is drawn for a sample depends on the seed and the sample's number in the run alone: a resumed run repeats an
    uninterrupted one, and several processes draw together what one would draw with their batches joined.

    Args:
        seed (`int`): Of the run.
        first_sample (`int`): Number of the batch's first sample, counted from the start of the run over all processes.
        count (`int`): Samples in the batch.
    """
    return [torch.Generator().manual_seed(seed + 1_000_003 * (first_sample + i + 1)) for i in range(count)]


def sample_timesteps(args: argparse.Namespace, generators: list[torch.Generator], last: int) -> torch.Tensor:
    """
    Draws one timestep from 0 to `last` for each generator.

    Args:
        args: `timestep_sampling`, `timestep_bias`, `train_timesteps` and `last_timestep_probability` are read.
        generators: One for each sample.
        last (`int`): The last timestep.

    Returns:
        `torch.Tensor` of shape `[B]`.
    """
    uniform, pure_noise = torch.stack([torch.rand(2, generator=generator) for generator in generators], 1)
    if args.timestep_sampling == "logit_normal":
        normal = torch.cat([torch.randn(1, generator=generator) for generator in generators])
        timesteps = (torch.sigmoid(normal) * (last + 1)).long().clamp(max=last)
    elif args.train_timesteps:
        timesteps = torch.tensor(args.train_timesteps)[(uniform * len(args.train_timesteps)).long()]
    else:
        timesteps = (uniform ** (1 / args.timestep_bias) * (last + 1)).long().clamp(max=last)
    return timesteps.where(pure_noise >= args.last_timestep_probability, torch.tensor(last))


def clean_of(prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor, schedule) -> torch.Tensor:
    """[`predicted_clean_latents`] by the noise schedule of a scheduler."""
    return predicted_clean_latents(
        prediction.float(), noisy, timesteps, schedule.alphas_cumprod, schedule.config.prediction_type
    )


@dataclass
class NoisedBatch:
    """
    A batch that is ready for the denoiser.

    Args:
        model_input (`torch.Tensor` of shape `[B, 9, h, w]`): Noisy latents, mask, latents of the masked picture.
        timesteps (`torch.Tensor` of shape `[B]`): Their timesteps.
        category_ids (`torch.Tensor` of shape `[B, tokens]`): Background or foreground tokens.
        latents (`torch.Tensor` of shape `[B, 4, h, w]`): The clean latents.
        noisy_latents (`torch.Tensor` of shape `[B, 4, h, w]`): The first part of `model_input`.
        target (`torch.Tensor` of shape `[B, 4, h, w]`): What is to be predicted.
        hole (`torch.Tensor` of shape `[B, 1, h, w]`): 1 where the hole touches a latent cell, else 0.
        weight (`torch.Tensor` of shape `[B, 1, h, w]`): Weight of the squared error, 1 on average but for min-SNR.
    """

    model_input: torch.Tensor
    timesteps: torch.Tensor
    category_ids: torch.Tensor
    latents: torch.Tensor
    noisy_latents: torch.Tensor
    target: torch.Tensor
    hole: torch.Tensor
    weight: torch.Tensor

    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        """The weighted mean squared error of a prediction `[B, 4, h, w]`."""
        return (self.weight * (prediction.float() - self.target).square()).mean()

    @torch.no_grad()
    def hole_error(self, prediction: torch.Tensor) -> torch.Tensor:
        """The mean squared error inside the holes alone, which tells more than the loss."""
        error = (prediction.float() - self.target).square().mean(1, keepdim=True)
        return (self.hole * error).sum() / self.hole.sum().clamp(min=1)


def noise_batch(
    args: argparse.Namespace,
    scheduler: DDIMScheduler,
    batch: dict[str, torch.Tensor],
    generators: list[torch.Generator],
    num_embeddings: int,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> NoisedBatch:
    """
    Draws timesteps, noise and categories for a batch.

    Args:
        args: See `training.arguments`.
        scheduler (`DDIMScheduler`): The noise schedule; its `prediction_type` decides the target.
        batch (`dict`): `latents`, `masked_latents` `[B, 4, h, w]`, `mask` `[B, 1, H, W]` and, if the samples have one,
            `category` `[B]` with 0 for background, 1 for foreground and -1 for one to be drawn.
        generators: See [`sample_generators`].
        num_embeddings (`int`): Size of the embedder's table; its first half is background.
        reduce (callable, *optional*): Averages a tensor over the processes.

    Returns:
        [`NoisedBatch`] on the device of the latents.
    """
    latents, mask = batch["latents"], batch["mask"]
    count, channels, *size = latents.shape
    timesteps = sample_timesteps(args, generators, scheduler.config.num_train_timesteps - 1)
    drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    noise = randn_tensor(latents.shape, generator=generators)
    noise = (noise + args.noise_offset * randn_tensor((count, channels, 1, 1), generator=generators)).to(latents)
    timesteps = timesteps.to(latents.device)

    # A hole without a category is a background hole. The foreground tokens take the part of the dropped condition in
    # classifier-free guidance: they see the same pictures, in a smaller share.
    foreground = (drawn < args.foreground_probability).long()
    if "category" in batch:
        category = batch["category"].cpu()
        foreground = category.where(category >= 0, foreground)
    category_ids = (torch.arange(num_embeddings // 2) + foreground[:, None] * (num_embeddings // 2)).to(latents.device)

    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    # A cell that the hole only touches is pasted from the prediction in part, so it counts as hole.
    hole = hole_at_latent_size(mask, size)
    weight = 1 + (args.hole_loss_weight - 1) * hole
    mean = weight.mean()
    weight = weight / (mean if reduce is None else reduce(mean))
    if args.snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        divisor = snr + 1 if is_velocity else snr
        weight = weight * (snr.clamp(max=args.snr_gamma) / divisor)[:, None, None, None]
    return NoisedBatch(
        model_input=torch.cat([noisy_latents, mask_to_latent_size(mask, size), batch["masked_latents"]], 1),
        timesteps=timesteps,
        category_ids=category_ids,
        latents=latents,
        noisy_latents=noisy_latents,
        target=scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise,
        hole=hole,
        weight=weight,
    )
