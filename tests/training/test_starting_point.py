"""Training and inference agree: noise schedule, latents, and what teacher and student predict."""

import argparse
import json

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from runs import UNET

from diffusers_moebius.loaders.release_checkpoint import make_release_scheduler
from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline
from diffusers_moebius.training.denoiser import ConditionedDenoiser
from diffusers_moebius.training.latent_cache import with_latents
from diffusers_moebius.training.starting_point import build_pipeline, check_schedules, load_unet_config


def make_args(tmp_path, vae_dir, **changes):
    (tmp_path / "unet.json").write_text(json.dumps(UNET))
    options = {
        "pretrained_model_name_or_path": None,
        "unet_config": tmp_path / "unet.json",
        "vae": vae_dir,
        "prediction_type": None,
        "rescale_betas_zero_snr": False,
    }
    return argparse.Namespace(**(options | changes))


def make_pipeline(vae_dir, scheduler, **vae_config):
    torch.manual_seed(0)
    vae = AutoencoderTiny.from_pretrained(vae_dir)
    vae.register_to_config(**vae_config)
    return MoebiusInpaintPipeline(vae, MoebiusUNet2DModel(**UNET), LatentCategoriesEmbedder(6, 8), scheduler)


def test_a_new_noise_schedule_is_the_releases(tmp_path, vae_dir):
    scheduler, release = build_pipeline(make_args(tmp_path, vae_dir)).scheduler, make_release_scheduler()
    for one in (scheduler, release):
        one.set_timesteps(20)
    assert scheduler.timesteps.tolist() == release.timesteps.tolist() == list(range(950, -1, -50))
    assert scheduler.final_alpha_cumprod == 1
    assert torch.equal(scheduler.alphas_cumprod, release.alphas_cumprod)
    assert scheduler.config.prediction_type == "epsilon"


def test_options_change_a_new_noise_schedule(tmp_path, vae_dir):
    args = make_args(tmp_path, vae_dir, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = build_pipeline(args).scheduler
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.prediction_type == "v_prediction"


def test_a_new_student_takes_over_what_its_teacher_predicts(tmp_path, vae_dir):
    teacher = make_pipeline(
        vae_dir,
        DDIMScheduler(
            beta_start=0.001, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )
    student = build_pipeline(make_args(tmp_path, vae_dir), teacher)
    check_schedules(student, teacher)
    assert student.scheduler.config.prediction_type == "v_prediction"
    assert student.scheduler.config.rescale_betas_zero_snr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v_prediction"}, r"`prediction_type` is 'v_prediction'.*`--prediction_type`"),
        ({"rescale_betas_zero_snr": True}, r"`rescale_betas_zero_snr` is True of the teacher.*`--rescale_betas_zero"),
        ({"beta_end": 0.02}, "`beta_end` is 0.02 of the teacher and 0.012 of the student"),
        ({"beta_schedule": "linear"}, "`beta_schedule`"),
        ({"num_train_timesteps": 500}, "`num_train_timesteps` is 500"),
        ({"trained_betas": [0.001] * 1000}, "`trained_betas`"),
    ],
)
def test_a_student_that_cannot_follow_its_teacher_is_refused(tmp_path, vae_dir, changes, message):
    student = make_pipeline(vae_dir, make_release_scheduler())
    teacher = make_pipeline(vae_dir, DDIMScheduler.from_config(make_release_scheduler().config, **changes))
    with pytest.raises(ValueError, match=message):
        check_schedules(student, teacher)


def test_how_a_schedule_is_sampled_does_not_matter_to_a_student(vae_dir):
    student = make_pipeline(vae_dir, make_release_scheduler())
    sampled = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "steps_offset": 1}
    check_schedules(
        student, make_pipeline(vae_dir, DDIMScheduler.from_config(make_release_scheduler().config, **sampled))
    )


def test_latents_of_training_and_inference_are_the_same(vae_dir):
    """Also where the autoencoder has a shift, in both directions."""
    pipeline = make_pipeline(vae_dir, make_release_scheduler(), scaling_factor=0.4, shift_factor=0.25)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 8:20, 8:20] = 1
    generators = [torch.Generator().manual_seed(number) for number in range(2)]
    batch = with_latents({"pixel_values": pixels, "mask": mask}, pipeline.vae, generators)
    own = pipeline.vae.encode(pixels).latents
    torch.testing.assert_close(batch["latents"], (own - 0.25) * 0.4)

    # A denoiser that predicts the noise exactly decodes to what the autoencoder itself makes of the picture.
    class Oracle(torch.nn.Module):
        def forward(self, sample, timesteps, context):
            return Output(noise)

    class Output(dict):
        def __init__(self, sample):
            super().__init__()
            self.sample = sample

    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([100, 700])
    noisy = pipeline.scheduler.add_noise(batch["latents"], noise, timesteps)
    denoiser = ConditionedDenoiser(Oracle(), pipeline.lcg_embedder, pipeline.vae, pipeline.scheduler)
    output = denoiser(torch.cat([noisy, mask[..., ::8, ::8], noisy], 1), timesteps, torch.zeros(2, 3).long())
    torch.testing.assert_close(output["pictures"], pipeline.vae.decode(own).sample, atol=1e-4, rtol=1e-4)


def test_unknown_unet_class_is_named(tmp_path):
    (tmp_path / "unet.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=r"_class_name.*PixelHackerUNet2DModel.*UNet2DConditionModel"):
        load_unet_config(tmp_path / "unet.json")
