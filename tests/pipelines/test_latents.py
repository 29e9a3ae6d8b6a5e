import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from small_parts import make_small_vae, seeded

from diffusers_moebius.pipelines.latents import (
    decode_latents,
    encode_latents,
    predicted_clean_latents,
    scale_latents,
    unscale_latents,
)


@pytest.fixture
def shifted_vae(tiny_vae):
    """An AutoencoderKL whose latents are shifted, as those of newer models are."""
    shifted = AutoencoderKL.from_config(tiny_vae.config, shift_factor=0.5, scaling_factor=0.25)
    shifted.load_state_dict(tiny_vae.state_dict())
    return shifted.eval()


@torch.no_grad()
def test_latents_are_shifted_and_scaled_on_the_way_in_and_back_on_the_way_out(shifted_vae):
    image = torch.rand(2, 3, 32, 48, generator=seeded(0)[0]) * 2 - 1
    latents = encode_latents(shifted_vae, image, seeded(1)[0])
    posterior = shifted_vae.encode(image).latent_dist
    torch.testing.assert_close(latents, (posterior.sample(seeded(1)[0]) - 0.5) * 0.25)
    torch.testing.assert_close(scale_latents(shifted_vae, unscale_latents(shifted_vae, latents)), latents)
    torch.testing.assert_close(decode_latents(shifted_vae, latents), shifted_vae.decode(latents / 0.25 + 0.5).sample)


@torch.no_grad()
def test_several_samples_of_a_picture_follow_each_other(tiny_vae):
    image = torch.rand(2, 3, 32, 32, generator=seeded(0)[0]) * 2 - 1
    latents = encode_latents(tiny_vae, image, seeded(1, 2, 1, 2), samples_per_image=2)
    assert latents.shape == (4, 4, 4, 4) and not torch.equal(latents[0], latents[1])
    alone = encode_latents(tiny_vae, image[1:], seeded(2))
    torch.testing.assert_close(latents[3:], alone, atol=1e-4, rtol=1e-4)


def test_gradients_pass_through_both_directions():
    vae = make_small_vae()
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    decode_latents(vae, encode_latents(vae, image)).sum().backward()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predicted_clean_latents_invert_the_scheduler(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    clean, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 900])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    prediction = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, timesteps),
        "sample": clean,
    }[prediction_type]
    result = predicted_clean_latents(prediction, noisy, timesteps, scheduler.alphas_cumprod, prediction_type)
    assert torch.allclose(result, clean, atol=1e-3)


def test_another_prediction_type_is_refused_by_name():
    sample = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match="`prediction_type`"):
        predicted_clean_latents(sample, sample, torch.tensor([1, 1]), torch.ones(10), "x0")
