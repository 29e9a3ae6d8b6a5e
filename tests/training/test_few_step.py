"""The losses of few-step distillation, each against a literal second form, values and gradients."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from diffusers_moebius.training.few_step import (
    LatentDiscriminator,
    consistency_loss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    guided_prediction,
    phase_ends,
    solver_step,
)
from diffusers_moebius.training.objective import clean_of

SOLVER_TIMESTEPS = list(range(49, 1000, 50))


def draw(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def assert_same(loss, literal, *inputs):
    """Equal values, and equal gradients with respect to each input."""
    torch.testing.assert_close(loss, literal)
    ours, theirs = torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(literal, inputs)
    for one, other in zip(ours, theirs):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


def cells(tensor):
    return [(b, y, x) for b in range(tensor.shape[0]) for y in range(tensor.shape[2]) for x in range(tensor.shape[3])]


@pytest.mark.parametrize("huber_c", [None, 0.1])
def test_consistency_loss_literally(huber_c):
    clean, target = draw(2, 3, 4, 5).float().detach().requires_grad_(), draw(2, 3, 4, 5, seed=1).float()
    weight = 1 + 9 * (draw(2, 1, 4, 5, seed=2).detach().float() > 0).float()
    literal = 0.0
    for b, y, x in cells(clean):
        for c in range(3):
            distance = clean[b, c, y, x] - target[b, c, y, x].item()
            value = distance**2 if huber_c is None else torch.sqrt(distance**2 + huber_c**2) - huber_c
            literal = literal + weight[b, 0, y, x] * value / clean.numel()
    assert_same(consistency_loss(clean, target, weight, huber_c), literal, clean)


def maps_and_hole():
    hole = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    hole[0, 0, 1:3, 1] = 1
    hole[1, 0, 3, 2:] = 1
    sizes = ((4, 4), (2, 2))
    real, fake = ([draw(2, 1, *size, seed=10 * k + i) for i, size in enumerate(sizes)] for k in (1, 2))
    return real, fake, hole


def literal_mean(maps, hole, value):
    """The mean of `value` over the cells of each map that the hole touches, then over the maps."""
    total = 0.0
    for number, values in enumerate(maps):
        step = hole.shape[2] // values.shape[2]
        touched = [
            (b, y, x)
            for b, y, x in cells(values)
            if hole[b, 0, y * step : (y + 1) * step, x * step : (x + 1) * step].any()
        ]
        total = total + sum(value(number, b, y, x) for b, y, x in touched) / len(touched) / len(maps)
    return total


def test_generator_loss_literally():
    _, fake, hole = maps_and_hole()
    literal = literal_mean(fake, hole, lambda k, b, y, x: -fake[k][b, 0, y, x])
    assert_same(generator_loss(fake, hole), literal, *fake)


def test_discriminator_loss_literally():
    real, fake, hole = maps_and_hole()

    def hinge(k, b, y, x):
        zero = torch.zeros((), dtype=torch.float64)
        return torch.maximum(1 - real[k][b, 0, y, x], zero) + torch.maximum(1 + fake[k][b, 0, y, x], zero)

    assert_same(discriminator_loss(real, fake, hole), literal_mean(real, hole, hinge), *real, *fake)


def test_gradient_penalty_literally():
    """Of heads whose gradient is known: the map is the square of a weighted sum of the channels."""
    weights = [draw(3, seed=5), draw(2, seed=6)]
    features = [draw(2, 3, 2, 2, seed=7), draw(2, 2, 3, 3, seed=8)]
    maps = [(w[:, None, None] * f).sum(1, keepdim=True).square() for w, f in zip(weights, features)]
    literal = 0.0
    for w, f in zip(weights, features):
        for b, y, x in cells(f):
            inner = sum(w[c] * f[b, c, y, x] for c in range(len(w)))
            literal = literal + sum((2 * inner * w[c]) ** 2 for c in range(len(w))) / len(f) / len(features)
    assert_same(gradient_penalty(maps, features), literal, *weights)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_solver_step_is_that_of_ddim(prediction_type, zero_snr):
    if zero_snr and prediction_type == "epsilon":
        pytest.skip("pure noise says nothing of noise")
    scheduler = DDIMScheduler(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(20)
    latents, prediction = draw(20, 4, 3, 3).detach().float(), draw(20, 4, 3, 3, seed=1).detach().float()
    timesteps = scheduler.timesteps
    clean = clean_of(prediction, latents, timesteps, scheduler)
    stepped = solver_step(clean, latents, timesteps, timesteps - 50, scheduler.alphas_cumprod)
    assert timesteps.tolist() == SOLVER_TIMESTEPS[::-1]
    for i, timestep in enumerate(timesteps):
        expected = scheduler.step(prediction[i], timestep, latents[i]).prev_sample
        torch.testing.assert_close(stepped[i], expected, rtol=1e-4, atol=1e-4)


def test_phases_end_where_the_sampler_steps():
    timesteps = torch.tensor(SOLVER_TIMESTEPS)
    for steps in (1, 2, 4):
        scheduler = DDIMScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        visited = [*scheduler.timesteps.tolist(), -1]
        assert set(visited) <= {*SOLVER_TIMESTEPS, -1}
        expected = [max(end for end in visited if end < t) for t in timesteps.tolist()]
        assert phase_ends(timesteps, steps).tolist() == expected


def test_guidance_is_that_of_the_pipeline():
    class Unet(nn.Module):
        dtype = torch.float32
        calls = 0

        def forward(self, sample, timesteps, context):
            self.calls += len(sample)
            value = sample[:, :4] * context.mean((1, 2))[:, None, None, None] + timesteps[:, None, None, None]
            return type("Output", (), {"sample": value})

    unet, sample, timesteps = Unet(), draw(3, 9, 2, 2).detach().float(), torch.tensor([1, 5, 9])
    foreground, background = torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 3.0)
    scale = torch.tensor([1.0, 2.5, 4.0])
    guided = guided_prediction(unet, sample, timesteps, foreground, background, scale)
    for i in range(3):
        fg, bg = 2 * sample[i, :4] + timesteps[i], 3 * sample[i, :4] + timesteps[i]
        torch.testing.assert_close(guided[i], fg + scale[i] * (bg - fg))
    assert unet.calls == 6
    plain = guided_prediction(unet, sample, timesteps, foreground, background, torch.ones(3))
    torch.testing.assert_close(plain, 3 * sample[:, :4] + timesteps[:, None, None, None])
    assert unet.calls == 9  # at half the cost


def test_discriminator_sees_the_hole_and_its_surroundings():
    torch.manual_seed(0)
    discriminator = LatentDiscriminator([6, 8])
    features = [torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2)]
    mask, masked = torch.zeros(2, 1, 8, 8), torch.randn(2, 4, 8, 8)
    maps = discriminator(features, mask, masked)
    assert [list(values.shape) for values in maps] == [[2, 1, 4, 4], [2, 1, 2, 2]]
    for other in (discriminator(features, 1 - mask, masked), discriminator(features, mask, -masked)):
        assert not any(torch.allclose(one, two) for one, two in zip(maps, other))
