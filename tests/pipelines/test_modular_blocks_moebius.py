"""The blocks against the pipeline, bit by bit, and each block on its own."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SkipLayerGuidance,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from small_parts import BETAS, hole, photo, seeded

from diffusers_moebius import MoebiusModularPipeline


@pytest.fixture
def both(tiny_pipeline):
    """The pipeline, and the blocks that share its components."""
    modular = MoebiusModularPipeline.from_pipe(tiny_pipeline)
    modular.set_progress_bar_config(disable=True)
    return tiny_pipeline, modular


def check_same(both, **call):
    pipe, modular = both
    seeds = call.pop("seeds", (0,))
    expected = pipe(**call, generator=seeded(*seeds)).images
    call |= {name: "none" for name in ("detail", "paste") if name in call and call[name] is None}
    result = modular(**call, generator=seeded(*seeds), output="images")
    assert len(result) == len(expected)
    for one, other in zip(result, expected):
        if torch.is_tensor(one):
            assert torch.equal(one, other)
        else:
            assert getattr(one, "mode", None) == getattr(other, "mode", None)
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    return result


class TestSameBitsAsThePipeline:
    RUN = {"num_inference_steps": 3}

    @pytest.mark.parametrize(
        ("size", "options"),
        [
            ((64, 64), {}),
            ((70, 90), {}),
            ((300, 200), {}),
            ((200, 300), {"padding_mask_crop": 10}),
            ((200, 300), {"padding_mask_crop": 0, "mask_dilation": 3}),
            ((100, 64), {"height": 64, "width": 96}),
        ],
    )
    @pytest.mark.parametrize("paste", ["exact", "seamless"])
    def test_sizes_crops_and_pastes(self, both, size, options, paste):
        check_same(both, image=photo(*size), mask_image=hole(*size), paste=paste, **options, **self.RUN)

    @pytest.mark.parametrize("strength", [0.6, 1.0])
    @pytest.mark.parametrize(
        "scheduler",
        [
            DDIMScheduler(**BETAS, clip_sample=False),
            DDIMScheduler(
                **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
            ),
            DPMSolverMultistepScheduler(**BETAS),
            UniPCMultistepScheduler(**BETAS),
            EulerDiscreteScheduler(**BETAS),
            EulerAncestralDiscreteScheduler(**BETAS),
            HeunDiscreteScheduler(**BETAS),
            LCMScheduler(**BETAS),
        ],
    )
    def test_schedulers_and_strengths(self, both, scheduler, strength):
        pipe, modular = both
        pipe.register_modules(scheduler=scheduler)
        modular.update_components(scheduler=scheduler)
        before = copy.deepcopy(vars(scheduler)).keys(), scheduler.timesteps.clone()
        check_same(both, image=photo(), mask_image=hole(), strength=strength, eta=0.3, num_inference_steps=5)
        assert (vars(scheduler).keys(), scheduler.timesteps.tolist()) == (before[0], before[1].tolist())

    @pytest.mark.parametrize(
        "options",
        [
            {"paste": "blur", "color_compensation": True},
            {"paste": None},
            {"detail": "patches"},
            {"detail": "patches", "num_images_per_prompt": 2, "seeds": (3, 4)},
            {"detail": None},
            {"output_type": "np"},
            {"output_type": "pt"},
            {"output_type": "latent"},
            {"masked_content": "fill", "strength": 0.7},
            {"masked_content": "noise", "strength": 0.7},
            {"noise_offset": 0.0, "strength": 1.0},
            {"latents": torch.full((1, 4, 8, 8), 0.5)},
            {"masked_image_latents": torch.full((1, 4, 8, 8), 0.5)},
            {"num_images_per_prompt": 2, "seeds": (3, 4)},
        ],
    )
    def test_options(self, both, options):
        check_same(both, image=photo(mode="RGBA"), mask_image=hole(), **options, **self.RUN)

    def test_custom_sigmas_and_timesteps(self, both):
        pipe, modular = both
        for scheduler, options in [
            (EulerDiscreteScheduler(**BETAS), {"sigmas": [10.0, 2.0, 0.5, 0.0]}),
            (DPMSolverMultistepScheduler(**BETAS), {"timesteps": [900, 400, 100]}),
        ]:
            pipe.register_modules(scheduler=scheduler)
            modular.update_components(scheduler=scheduler)
            check_same(both, image=photo(), mask_image=hole(), strength=1.0, **options)

    def test_weight_of_a_lora(self, both):
        torch.manual_seed(0)
        both[0].unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        call = {"image": photo(), "mask_image": hole(), "output_type": "latent", **self.RUN}
        whole, half = (check_same(both, **call, attention_kwargs={"scale": scale}) for scale in (1.0, 0.5))
        assert not torch.allclose(whole, half)

    def test_a_batch_in_which_one_mask_is_empty(self, both, caplog):
        images, masks = [photo(seed=1), photo(seed=2)], [hole(), np.zeros((64, 64), bool)]
        results = both[1](image=images, mask_image=masks, **self.RUN, output="images")
        assert "`mask_image` is empty" in caplog.text
        np.testing.assert_array_equal(results[1], images[1])
        assert (np.asarray(results[0]) != np.asarray(images[0]))[hole()].any()

    def test_defaults_are_the_checkpoint_s(self, tiny_pipeline):
        pipe = type(tiny_pipeline).from_pipe(
            tiny_pipeline, default_guidance_scale=2.0, default_paste="seamless", default_strength=1.0
        )
        pipe.use_few_steps(5).set_progress_bar_config(disable=True)
        modular = MoebiusModularPipeline.from_pipe(pipe)
        assert modular.guider.config.guidance_scale == 2.0 and modular.guider.config.start == 0.4
        check_same((pipe, modular), image=photo(), mask_image=hole())


class TestGuider:
    RUN = {"image": photo(), "mask_image": hole(), "num_inference_steps": 4, "strength": 1.0}

    def branches(self, modular, unet):
        sizes = []
        hook = unet.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
        modular(**self.RUN, generator=seeded(0))
        hook.remove()
        return sizes

    def test_interval_is_the_guider_s(self, both, tiny_unet):
        pipe, modular = both
        assert self.branches(modular, tiny_unet) == [2, 2, 2, 2]
        modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.25, stop=0.75))
        assert self.branches(modular, tiny_unet) == [1, 2, 2, 1]
        interval = {"guidance_scale": 3.0, "guidance_start": 0.25, "guidance_end": 0.75}
        expected = pipe(**self.RUN, **interval, generator=seeded(0)).images[0]
        np.testing.assert_array_equal(modular(**self.RUN, generator=seeded(0), output="images")[0], expected)
        modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
        assert self.branches(modular, tiny_unet) == [1, 1, 1, 1]

    def test_other_guiders_take_its_place_and_are_not_changed(self, both):
        _, modular = both
        plain = modular(**self.RUN, generator=seeded(0), output="latents")
        guider = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=0.5)
        modular.update_components(guider=guider)
        before = copy.deepcopy(guider.get_state())
        first = modular(**self.RUN, generator=seeded(0), output="latents")
        assert guider.get_state() == before
        assert torch.equal(first, modular(**self.RUN, generator=seeded(0), output="latents"))
        assert first.isfinite().all() and not torch.allclose(first, plain)

    def test_a_guider_that_changes_the_denoiser_is_refused_by_name(self, both):
        _, modular = both
        modular.update_components(guider=SkipLayerGuidance(skip_layer_guidance_layers=[0]))
        with pytest.raises(ValueError, match=r"`guider`.*SkipLayerGuidance"):
            modular(**self.RUN)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image": [photo(), photo(64, 96)], "mask_image": [hole(), hole(64, 96)]}, "image"),
        ({"image": photo(8, 8), "mask_image": hole(8, 8)}, "image"),
        ({"mask_image": hole(32, 64)}, "mask_image"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"strength": 1.5}, "strength"),
        ({"masked_content": "nothing"}, "masked_content"),
        ({"masked_content": "fill", "strength": 1.0}, "masked_content"),
        ({"eta": -1.0}, "eta"),
        ({"noise_offset": float("nan")}, "noise_offset"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"mask_dilation": -1}, "mask_dilation"),
        ({"padding_mask_crop": 1.5}, "padding_mask_crop"),
        ({"height": 100}, "height"),
        ({"paste": "Exact"}, "paste"),
        ({"detail": "Patches"}, "detail"),
        ({"output_type": "png"}, "output_type"),
        ({"timesteps": []}, "timesteps"),
        ({"generator": 42}, "generator"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents"),
        ({"masked_image_latents": torch.zeros(1, 3, 8, 8)}, "masked_image_latents"),
    ],
)
def test_bad_input_is_refused_by_name_before_anything_is_denoised(both, monkeypatch, options, name):
    _, modular = both
    monkeypatch.setattr(modular.unet, "forward", lambda *args, **kwargs: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=f"`{name}`"):
        modular(**{"image": photo(), "mask_image": hole(), **options})
