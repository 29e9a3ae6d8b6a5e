import argparse

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_moebius.training.objective import noise_batch, sample_generators, sample_timesteps

DEFAULTS = {
    "timestep_sampling": "uniform",
    "timestep_bias": 1.0,
    "train_timesteps": None,
    "last_timestep_probability": 0.0,
    "foreground_probability": 0.25,
    "noise_offset": 0.0357,
    "hole_loss_weight": 1.0,
    "snr_gamma": None,
}


def make_args(**changes):
    return argparse.Namespace(**(DEFAULTS | changes))


def make_batch(count):
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(count, 1, 32, 32)
    mask[:, :, 5:20, 9:30] = 1
    return {
        "latents": torch.randn(count, 4, 4, 4, generator=generator),
        "masked_latents": torch.randn(count, 4, 4, 4, generator=generator),
        "mask": mask,
    }


def test_timesteps_follow_their_options():
    args = make_args(timestep_bias=3.0, last_timestep_probability=0.25)
    timesteps = sample_timesteps(args, sample_generators(0, 0, 4000), 999)
    assert timesteps.min() >= 0 and timesteps.max() == 999
    assert (timesteps == 999).float().mean() == pytest.approx(0.25, abs=0.03)
    assert timesteps[timesteps < 999].float().mean() == pytest.approx(750, abs=15)  # the mean of u^(1/3)


def test_only_the_chosen_timesteps_are_trained():
    args = make_args(train_timesteps=[749, 249], last_timestep_probability=0.5)
    timesteps = sample_timesteps(args, sample_generators(0, 0, 2000), 999)
    shares = {int(value): (timesteps == value).float().mean().item() for value in timesteps.unique()}
    assert shares == pytest.approx({249: 0.25, 749: 0.25, 999: 0.5}, abs=0.05)


def test_logit_normal_timesteps_gather_in_the_middle():
    timesteps = sample_timesteps(make_args(timestep_sampling="logit_normal"), sample_generators(0, 0, 4000), 999)
    # Quartiles of the normal distribution, through the sigmoid.
    quartiles = torch.quantile(timesteps.float(), torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([337.5, 500.0, 662.5]), atol=15, rtol=0)


def test_samples_do_not_depend_on_how_batches_are_cut():
    args, scheduler, batch = make_args(), DDIMScheduler(), make_batch(6)
    whole = noise_batch(args, scheduler, batch, sample_generators(3, 0, 6), 20)
    parts = [
        noise_batch(
            args,
            scheduler,
            {name: value[start : start + 3] for name, value in batch.items()},
            sample_generators(3, start, 3),
            20,
        )
        for start in (0, 3)
    ]
    for name in ("model_input", "timesteps", "category_ids", "target"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert not torch.equal(whole.target[0], whole.target[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_leads_back_to_the_clean_latents(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    noised = noise_batch(make_args(), scheduler, make_batch(4), sample_generators(0, 0, 4), 20)
    alpha = scheduler.alphas_cumprod[noised.timesteps].view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        clean = (noised.noisy_latents - (1 - alpha).sqrt() * noised.target) / alpha.sqrt()
    else:
        clean = alpha.sqrt() * noised.noisy_latents - (1 - alpha).sqrt() * noised.target
    torch.testing.assert_close(clean, noised.latents, atol=1e-3, rtol=1e-3)


def test_the_category_of_a_sample_goes_before_the_drawn_one():
    batch = make_batch(200) | {"category": torch.tensor([0, 1, -1, -1] * 50)}
    noised = noise_batch(make_args(), DDIMScheduler(), batch, sample_generators(0, 0, 200), 20)
    assert noised.category_ids.shape == (200, 10)
    is_foreground = noised.category_ids[:, 0] == 10
    assert not is_foreground[0::4].any() and is_foreground[1::4].all()
    assert is_foreground.view(50, 4)[:, 2:].float().mean() == pytest.approx(0.25, abs=0.12)


def test_the_hole_weighs_more_and_the_mean_stays():
    batch = make_batch(2)
    plain = noise_batch(make_args(), DDIMScheduler(), batch, sample_generators(0, 0, 2), 20)
    heavy = noise_batch(make_args(hole_loss_weight=9.0), DDIMScheduler(), batch, sample_generators(0, 0, 2), 20)
    assert (plain.weight == 1).all()
    inside, outside = heavy.weight[heavy.hole == 1], heavy.weight[heavy.hole == 0]
    assert heavy.weight.mean() == pytest.approx(1, abs=1e-5)
    assert (inside / outside.mean()).allclose(torch.tensor(9.0))
    prediction = plain.target + heavy.hole  # wrong by 1 inside the holes only
    assert heavy.hole_error(prediction) == pytest.approx(1, abs=1e-5)
    assert heavy.loss(prediction) > plain.loss(prediction)
