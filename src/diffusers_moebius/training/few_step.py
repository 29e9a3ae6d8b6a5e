"""Losses that make a denoiser need few steps: consistency with a guided solver, and a discriminator of latents."""

import torch
import torch.nn.functional as F
from torch import nn


def phase_ends(timesteps: torch.Tensor, num_phases: int) -> torch.Tensor:
    """
    Where the phases end in which timesteps of 1000 lie; below 0 is without noise.

    A sampler of `num_phases` steps begins each of its steps at the end of a phase (arXiv 2405.18407, section 3.2): the
    student learns to go from anywhere in a phase to its end, and so goes along the teacher's path in all its steps.

    Args:
        timesteps (`torch.Tensor` of shape `[B]`): Timesteps.
        num_phases (`int`): Phases of equal length; a divisor of 1000.

    Returns:
        `torch.Tensor` of shape `[B]`.
    """
    length = 1000 // num_phases
    return timesteps // length * length - 1


def guided_prediction(
    unet: nn.Module,
    model_input: torch.Tensor,
    timesteps: torch.Tensor,
    foreground: torch.Tensor,
    background: torch.Tensor,
    guidance_scale: torch.Tensor,
) -> torch.Tensor:
    """
    The teacher's prediction with its guidance.

    Args:
        unet ([`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`]): The teacher.
        model_input (`torch.Tensor` of shape `[B, 9, h, w]`): Noisy latents, mask, latents of the masked picture.
        timesteps (`torch.Tensor` of shape `[B]`): Their timesteps.
        foreground, background (`torch.Tensor` of shape `[1, tokens, dim]`): Embedded categories.
        guidance_scale (`torch.Tensor` of shape `[B]`): Scale `s` in `eps_fg + s (eps_bg - eps_fg)`; with none above 1
            the background branch runs alone, as in the pipeline.

    Returns:
        `torch.Tensor` of shape `[B, 4, h, w]`, float32.
    """
    count, model_input = len(model_input), model_input.to(unet.dtype)
    background = background.expand(count, -1, -1)
    if not (guidance_scale > 1).any():
        return unet(model_input, timesteps, background).sample.float()
    context = torch.cat([foreground.expand(count, -1, -1), background])
    both = unet(torch.cat([model_input] * 2), torch.cat([timesteps] * 2), context).sample.float()
    foreground_prediction, background_prediction = both.chunk(2)
    scale = guidance_scale.to(both).clamp(min=1)[:, None, None, None]
    return foreground_prediction + scale * (background_prediction - foreground_prediction)


def solver_step(
    clean_latents: torch.Tensor,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    earlier_timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """
    One step of DDIM (eta 0) from the clean latents that a prediction implies.

    Args:
        clean_latents (`torch.Tensor` of shape `[B, C, h, w]`): What the prediction implies.
        noisy_latents (`torch.Tensor` of shape `[B, C, h, w]`): Where the step begins.
        timesteps (`torch.Tensor` of shape `[B]`): Timesteps where it begins.
        earlier_timesteps (`torch.Tensor` of shape `[B]`): Timesteps where it ends; below 0 is without noise.
        alphas_cumprod (`torch.Tensor` of shape `[T]`): Of the noise schedule.

    Returns:
        `torch.Tensor` of shape `[B, C, h, w]`.

    Formula: Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502), equation 12 with sigma 0.
    """
    alphas = torch.cat([alphas_cumprod, alphas_cumprod.new_ones(1)]).to(noisy_latents)  # the last one for -1
    alpha, earlier = (alphas[t.clamp(min=-1)].view(-1, 1, 1, 1) for t in (timesteps, earlier_timesteps))
    noise = (noisy_latents - alpha.sqrt() * clean_latents) / (1 - alpha).sqrt()
    return earlier.sqrt() * clean_latents + (1 - earlier).sqrt() * noise


def consistency_loss(
    clean_latents: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, huber_c: float | None = 0.001
) -> torch.Tensor:
    """
    How far from each other the student ends from a point and from the point one solver step earlier.

    Args:
        clean_latents (`torch.Tensor` of shape `[B, C, h, w]`): Where it ends from the later point.
        target (`torch.Tensor` of shape `[B, C, h, w]`): Where it ends from the earlier point, without gradient.
        weight (`torch.Tensor` of shape `[B, 1, h, w]`): What each place counts, 1 on average.
        huber_c (`float`, *optional*, defaults to 0.001): Of the pseudo-Huber distance; `None` is the squared error.

    Returns:
        `torch.Tensor`: Scalar.

    Formula: latent consistency distillation (arXiv 2310.04378), equation 7, with the distance of arXiv 2310.14189.
    """
    error = (clean_latents.float() - target.detach().float()).square()
    if huber_c is not None:
        error = (error + huber_c**2).sqrt() - huber_c
    return (weight * error).mean()


class LatentDiscriminator(nn.Module):
    """
    Small heads on the features of a frozen denoiser, which see mask and masked latents too.

    Args:
        widths (`list[int]`): Channels of the features.
        latent_channels (`int`, defaults to 4): Channels of the latents.
        hidden_channels (`int`, defaults to 64): Width of a head.

    As in latent adversarial diffusion distillation (arXiv 2403.12015); that the discriminator of an inpainting model
    needs mask and surroundings is from TurboFill (arXiv 2504.00996).
    """

    def __init__(self, widths: list[int], latent_channels: int = 4, hidden_channels: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width + 1 + latent_channels, hidden_channels, 1),
                nn.GroupNorm(8, hidden_channels),
                nn.SiLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
                nn.GroupNorm(8, hidden_channels),
                nn.SiLU(),
                nn.Conv2d(hidden_channels, 1, 1),
            )
            for width in widths
        )

    def forward(
        self, features: list[torch.Tensor], mask: torch.Tensor, masked_latents: torch.Tensor
    ) -> list[torch.Tensor]:
        """Maps `[B, 1, h, w]` of features `[B, width, h, w]`, mask `[B, 1, H, W]` and latents `[B, 4, H, W]`."""
        given = torch.cat([mask, masked_latents], 1)
        return [
            head(torch.cat([feature.float(), F.interpolate(given, feature.shape[2:], mode="area")], 1))
            for head, feature in zip(self.heads, features)
        ]


def _mean_in_hole(maps: list[torch.Tensor], hole: torch.Tensor) -> torch.Tensor:
    """The mean over the hole `[B, 1, H, W]` of each map `[B, 1, h, w]`, and of these over the maps."""
    means = []
    for values in maps:
        weight = F.adaptive_max_pool2d(hole, values.shape[2:])
        means.append((weight * values).sum() / weight.sum().clamp(min=1))
    return torch.stack(means).mean()


def generator_loss(fake: list[torch.Tensor], hole: torch.Tensor) -> torch.Tensor:
    """What the student minimises: minus the discriminator's maps `[B, 1, h, w]` of its latents, in the hole."""
    return _mean_in_hole([-values for values in fake], hole)


def discriminator_loss(real: list[torch.Tensor], fake: list[torch.Tensor], hole: torch.Tensor) -> torch.Tensor:
    """The hinge loss of the discriminator's maps `[B, 1, h, w]` of true and of made latents, in the hole."""
    return _mean_in_hole([F.relu(1 - r) + F.relu(1 + f) for r, f in zip(real, fake)], hole)


def gradient_penalty(real: list[torch.Tensor], features: list[torch.Tensor]) -> torch.Tensor:
    """
    R1: the squared gradient of the maps with respect to the features of true latents, a sample on average.

    Args:
        real (`list` of `torch.Tensor` of shape `[B, 1, h, w]`): The discriminator's maps of true latents.
        features (`list` of `torch.Tensor` of shape `[B, width, h, w]`): Its inputs, which require a gradient.

    Formula: Mescheder et al. (arXiv 1801.04406), equation 9, on features instead of pictures as in arXiv 2311.17042.
    """
    gradients = torch.autograd.grad([values.sum() for values in real], features, create_graph=True)
    return sum(gradient.square().flatten(1).sum(1).mean() for gradient in gradients) / len(gradients)
