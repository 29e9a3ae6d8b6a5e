import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from small_parts import BETAS, OracleUNet, hole, photo, seeded

from diffusers_moebius.pipelines.latents import encode_latents
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


class TestSchedulers:
    SCHEDULERS = {
        "ddim": DDIMScheduler(**BETAS, clip_sample=False),
        "ddim v, zero terminal SNR": DDIMScheduler(
            **BETAS,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
        "dpm++": DPMSolverMultistepScheduler(**BETAS),
        "dpm++ v, trailing": DPMSolverMultistepScheduler(
            **BETAS, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
        "unipc": UniPCMultistepScheduler(**BETAS),
        "euler": EulerDiscreteScheduler(**BETAS),
        "euler v, zero terminal SNR": EulerDiscreteScheduler(
            **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        "euler, leading": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        "euler ancestral": EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
        "lcm": LCMScheduler(**BETAS, clip_sample=False),
        "heun": HeunDiscreteScheduler(**BETAS),
    }

    @pytest.mark.parametrize("strength", [0.6, 1.0])
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_exact_predictions_lead_to_the_clean_latents(self, pipe, tiny_unet, name, strength):
        scheduler = self.SCHEDULERS[name]
        image = photo()
        oracle = OracleUNet.from_config(tiny_unet.config)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            oracle.clean = pipe.vae.encode(values).latents
        oracle.scheduler, oracle.found = scheduler, []
        pipe.register_modules(unet=oracle, scheduler=scheduler)
        result = pipe(
            image,
            hole(),
            strength=strength,
            num_inference_steps=10,
            guidance_scale=1,
            noise_offset=0,
            generator=seeded(3),
            output_type="latent",
        ).images

        tolerance = 0.05 if name == "lcm" else 2e-3  # LCM keeps a little noise by its boundary condition
        torch.testing.assert_close(result, oracle.clean, atol=tolerance, rtol=0)
        # The start is what the first timestep stands for: the drawn noise over the picture, or the noise alone.
        noise = torch.randn(oracle.clean.shape, generator=seeded(3)[0])
        seen, found = oracle.found[0]
        torch.testing.assert_close(found if strength < 1 else seen, noise, atol=5e-3, rtol=5e-3)
        expected = 6 if strength < 1 else 10
        assert len(oracle.found) == (2 * expected - 1 if name == "heun" else expected)

    def test_custom_timesteps_and_sigmas(self, pipe):
        run = {"image": photo(), "mask_image": hole(), "strength": 1.0, "guidance_scale": 1, "output_type": "latent"}
        seen = []

        def record(pipeline, step, timestep, tensors):
            seen.append(float(timestep))
            return tensors

        pipe.register_modules(scheduler=DPMSolverMultistepScheduler(**BETAS))
        pipe(**run, timesteps=[900, 400, 100], callback_on_step_end=record)
        assert seen == [900, 400, 100]
        pipe.register_modules(scheduler=EulerDiscreteScheduler(**BETAS))
        seen.clear()
        pipe(**run, sigmas=[10.0, 2.0, 0.5, 0.0], callback_on_step_end=record)
        assert len(seen) == 3 and pipe.num_timesteps == 3
        with pytest.raises(ValueError, match="`timesteps`"):
            pipe(**run, timesteps=[900], sigmas=[1.0])

    def test_scheduler_of_the_pipeline_is_not_touched(self, pipe):
        for scheduler in self.SCHEDULERS.values():
            pipe.register_modules(scheduler=scheduler)
            before = copy.deepcopy(vars(scheduler))
            pipe(photo(), hole(), num_inference_steps=2, guidance_scale=1)
            after = vars(scheduler)
            assert before.keys() == after.keys()
            for key, value in before.items():
                equal = torch.equal(value, after[key]) if torch.is_tensor(value) else np.all(value == after[key])
                assert equal, (scheduler, key)

    def test_eta_adds_noise(self, pipe):
        run = {"image": photo(), "mask_image": hole(), "num_inference_steps": 3, "output_type": "latent"}
        still = pipe(**run, generator=seeded(0)).images
        torch.testing.assert_close(pipe(**run, generator=seeded(0), eta=0.0).images, still)
        assert (pipe(**run, generator=seeded(0), eta=1.0).images - still).abs().max() > 0.01


class TestGuidance:
    def test_interval_and_scale_choose_the_branches(self, pipe, unet_calls):
        run = {"image": photo(), "mask_image": hole(), "strength": 1.0, "num_inference_steps": 4}
        for options, expected in [
            ({}, [2, 2, 2, 2]),
            ({"guidance_scale": 1.0}, [1, 1, 1, 1]),
            ({"guidance_scale": 0.0}, [1, 1, 1, 1]),
            ({"guidance_start": 0.25, "guidance_end": 0.75}, [1, 2, 2, 1]),
            ({"guidance_end": 0.6}, [2, 2, 1, 1]),
            ({"guidance_start": 0.3}, [1, 1, 2, 2]),
            ({"guidance_start": 0.5, "guidance_end": 0.5}, [1, 1, 1, 1]),
        ]:
            unet_calls.clear()
            pipe(**run, **options)
            assert [shape[0] for shape in unet_calls] == expected, options

    def test_order_and_formula(self, pipe, tiny_unet):
        inputs, outputs = [], []

        def record(module, args, kwargs, output):
            inputs.append((args[0], kwargs["encoder_hidden_states"]))
            outputs.append(output[0])

        tiny_unet.register_forward_hook(record, with_kwargs=True)
        start = torch.randn(1, 4, 8, 8)
        run = {"image": photo(), "mask_image": hole(), "strength": 1.0, "num_inference_steps": 2, "latents": start}
        result = pipe(**run, guidance_scale=3.0, guidance_end=0.5, output_type="latent").images
        embedder = pipe.lcg_embedder
        foreground = embedder(embedder.category_ids("foreground")).embeds[0]
        background = embedder(embedder.category_ids("background")).embeds[0]
        torch.testing.assert_close(inputs[0][1], torch.stack([foreground, background]))
        torch.testing.assert_close(inputs[1][1], background[None])
        torch.testing.assert_close(inputs[0][0][0], inputs[0][0][1])

        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(2)
        latents = start
        for t, output in zip(scheduler.timesteps, outputs):
            if len(output) == 2:
                output = output[:1] + 3 * (output[1:] - output[:1])
            latents = scheduler.step(output, t, latents).prev_sample
        torch.testing.assert_close(result, latents)

    def test_default_is_the_checkpoint_s(self, pipe):
        assert pipe.config.default_guidance_scale == 2.5
        portrait = MoebiusInpaintPipeline.from_pipe(pipe, default_guidance_scale=2.0)
        portrait.set_progress_bar_config(disable=True)
        run = {"image": photo(), "mask_image": hole(), "num_inference_steps": 2, "output_type": "latent"}
        default = portrait(**run, generator=seeded(0)).images
        assert portrait.guidance_scale == 2.0
        torch.testing.assert_close(default, pipe(**run, guidance_scale=2.0, generator=seeded(0)).images)
        assert not torch.allclose(default, pipe(**run, generator=seeded(0)).images)

    def test_default_steps_and_strength_are_the_checkpoint_s(self, pipe, tmp_path):
        few = MoebiusInpaintPipeline.from_pipe(pipe, default_num_inference_steps=4, default_strength=1.0)
        few.save_pretrained(tmp_path)
        few = MoebiusInpaintPipeline.from_pretrained(tmp_path)
        few.set_progress_bar_config(disable=True)
        steps = []
        few(photo(), hole(), callback_on_step_end=lambda *args: steps.append(args[1]) or {})
        assert steps == [0, 1, 2, 3] and few.num_timesteps == 4
        assert pipe.config.default_num_inference_steps == 20 and pipe.config.default_strength == 0.99

    def test_default_paste_is_the_checkpoint_s(self, pipe, tmp_path):
        run = {"image": photo(), "mask_image": hole(), "num_inference_steps": 1, "strength": 1.0}
        assert pipe.config.default_paste == "exact"
        MoebiusInpaintPipeline.from_pipe(pipe, default_paste="seamless").save_pretrained(tmp_path)
        seamless = MoebiusInpaintPipeline.from_pretrained(tmp_path)
        seamless.set_progress_bar_config(disable=True)
        results = {
            (name, paste): np.asarray(each(**run, paste=paste, generator=seeded(0)).images[0])
            for name, each in {"exact": pipe, "seamless": seamless}.items()
            for paste in ("auto", "exact", "seamless")
        }
        for name in ("exact", "seamless"):
            np.testing.assert_array_equal(results[name, "auto"], results[name, name])
            np.testing.assert_array_equal(results[name, "auto"], results["exact", name])
        assert (results["exact", "auto"] != results["seamless", "auto"]).any()

    def test_default_detail_is_the_checkpoint_s(self, pipe):
        run = {"image": photo(96, 96), "mask_image": hole(96, 96), "num_inference_steps": 1, "strength": 1.0}
        patches = MoebiusInpaintPipeline.from_pipe(pipe, default_detail="patches")
        patches.set_progress_bar_config(disable=True)

        def result(pipeline, **options):
            return np.asarray(pipeline(**run, generator=seeded(0), **options).images[0])

        assert pipe.config.default_detail == "enlarged"
        plain = result(pipe, detail=None, height=96)
        np.testing.assert_array_equal(result(pipe, height=96), plain)  # nothing is enlarged
        np.testing.assert_array_equal(result(patches, height=96), result(pipe, detail="patches", height=96))
        assert (result(patches, height=96) != plain).any()
        assert (result(pipe, height=64) != result(pipe, detail=None, height=64)).any()
        inside = hole(96, 96)
        np.testing.assert_array_equal(result(patches)[~inside], np.asarray(run["image"])[~inside])

    def test_detail_draws_from_the_generator_of_each_picture(self, pipe):
        call = {"mask_image": hole(), "num_inference_steps": 1, "strength": 1.0, "detail": "patches"}
        both = pipe([photo(), photo(seed=1)], generator=seeded(3, 4), **call).images
        for image, seed, result in zip((photo(), photo(seed=1)), (3, 4), both):
            alone = pipe(image, generator=seeded(seed), **call).images[0]
            np.testing.assert_array_equal(np.asarray(alone), np.asarray(result))

    def test_tokens_are_one_tensor_over_the_steps(self, pipe, tiny_unet):
        seen = []
        tiny_unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        pipe(photo(), hole(), strength=1.0, num_inference_steps=4, guidance_end=0.5)
        assert seen[0] is seen[1] and seen[2] is seen[3]


class TestRandomness:
    RUN = {"num_inference_steps": 3, "guidance_scale": 1, "output_type": "latent"}

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler])
    def test_generator_per_picture(self, tiny_pipeline, scheduler):
        tiny_pipeline.register_modules(scheduler=scheduler(**BETAS))
        images = [photo(seed=i) for i in range(3)]
        run = {**self.RUN, "eta": 0.5}
        together = tiny_pipeline(images, hole(), generator=seeded(5, 6, 7), **run).images
        for i, image in enumerate(images):
            alone = tiny_pipeline(image, hole(), generator=seeded(5 + i)[0], **run).images[0]
            torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-4)
        reordered = tiny_pipeline(images[::-1], hole(), generator=seeded(7, 6, 5), **run).images
        torch.testing.assert_close(reordered.flip(0), together, atol=1e-4, rtol=1e-4)

    def test_several_results_a_picture(self, tiny_pipeline):
        images = [photo(seed=i) for i in range(2)]
        run = {**self.RUN, "num_images_per_prompt": 2}
        each = tiny_pipeline(images, hole(), generator=seeded(1, 2, 3, 4), **run).images
        assert len(each) == 4
        for row, (image, seed) in enumerate(zip([images[0]] * 2 + [images[1]] * 2, (1, 2, 3, 4))):
            alone = tiny_pipeline(image, hole(), generator=seeded(seed), **self.RUN).images[0]
            torch.testing.assert_close(each[row], alone, atol=1e-4, rtol=1e-4)
        shared = tiny_pipeline(images, hole(), generator=seeded(1, 2), **run).images
        assert not torch.allclose(shared[0], shared[1])
        again = tiny_pipeline(images[1], hole(), generator=seeded(2), **run).images
        torch.testing.assert_close(shared[2:], again, atol=1e-4, rtol=1e-4)

    def test_one_generator_repeats_itself(self, pipe):
        images = [photo(), photo(64, 96)]
        masks = [hole(), hole(64, 96)]
        first = pipe(images, masks, generator=seeded(0)[0], **self.RUN).images
        second = pipe(images, masks, generator=seeded(0)[0], **self.RUN).images
        for one, other in zip(first, second):
            torch.testing.assert_close(one, other)

    def test_noise_offset(self, pipe):
        start = {}

        def record(module, args):
            start.setdefault("latents", args[0][:, :4])

        pipe.unet.register_forward_pre_hook(record)
        noises = []
        for offset in (0.0, 0.5):
            start.clear()
            pipe(photo(), hole(), noise_offset=offset, generator=seeded(0), **self.RUN | {"strength": 1.0})
            noises.append(start["latents"])
        generator = seeded(0)[0]
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        torch.testing.assert_close(noises[0], noise)
        torch.testing.assert_close(noises[1], noise + 0.5 * torch.randn(1, 4, 1, 1, generator=generator))

    def test_given_latents_are_the_start(self, pipe):
        seen = []
        pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        latents, masked = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        pipe([photo()] * 2, hole(), latents=latents, masked_image_latents=masked, **self.RUN)
        torch.testing.assert_close(seen[0][:, :4], latents)
        torch.testing.assert_close(seen[0][:, 5:], masked)
        assert set(seen[0][:, 4].unique().tolist()) == {0.0, 1.0}
        mixed = [torch.randn(4, 8, 8), torch.randn(4, 8, 12)]
        seen.clear()
        pipe([photo(), photo(64, 96)], [hole(), hole(64, 96)], latents=mixed, **self.RUN)
        torch.testing.assert_close(seen[0][0, :4], mixed[0])
        torch.testing.assert_close(seen[-1][0, 5:], seen[-1][0, 5:])

    def test_latents_from_one_call_start_the_next(self, pipe):
        half = pipe(photo(), hole(), **self.RUN).images
        assert pipe(photo(), hole(), latents=half, **self.RUN).images.shape == half.shape

    def test_given_latents_spare_the_encoder(self, tiny_pipeline, monkeypatch):
        encoded = []
        encode = tiny_pipeline.vae.encode
        monkeypatch.setattr(tiny_pipeline.vae, "encode", lambda x: encoded.append(len(x)) or encode(x))
        latents = torch.randn(2, 4, 8, 8)
        run = {**self.RUN, "num_images_per_prompt": 2}
        for options, expected in [
            ({}, [1, 1]),
            ({"strength": 1.0}, [1]),
            ({"latents": latents}, [1]),
            ({"masked_image_latents": latents}, [1]),
            ({"latents": latents, "masked_image_latents": latents}, []),
        ]:
            encoded.clear()
            tiny_pipeline(photo(), hole(), **{**run, **options})
            assert encoded == expected, options


@pytest.mark.parametrize("masked_content", ["original", "fill", "noise"])
def test_start_depends_on_the_hole_only_with_the_original(smallest_pipe, masked_content):
    starts = []

    class RecordingScheduler(DDIMScheduler):
        def add_noise(self, original_samples, noise, timesteps):
            starts.append((original_samples, noise))
            return super().add_noise(original_samples, noise, timesteps)

    scheduler = RecordingScheduler.from_config(smallest_pipe.scheduler.config)
    smallest_pipe = MoebiusInpaintPipeline.from_pipe(smallest_pipe, scheduler=scheduler)
    smallest_pipe.set_progress_bar_config(disable=True)
    mask = hole()
    images = [np.full((64, 64, 3), 80, np.uint8) for _ in range(2)]
    images[1][mask] = 200
    for image in images:
        call = {"strength": 0.5, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        smallest_pipe(image, mask, masked_content=masked_content, output_type="latent", **call)
    (first, noise), (second, other_noise) = starts
    assert torch.equal(noise, other_noise)
    inside = torch.nn.functional.interpolate(torch.tensor(mask)[None, None].float(), first.shape[2:]) > 0
    inside = inside.expand_as(first)
    if masked_content == "original":
        assert (first[inside] - second[inside]).abs().min() > 0
    elif masked_content == "fill":
        assert torch.equal(first, second)  # and so is a picture in one colour
        flat = encode_latents(smallest_pipe.vae, torch.full((1, 3, 64, 64), 2 * 80 / 255 - 1))
        assert torch.allclose(first, flat, atol=1e-4)
    else:
        assert torch.equal(first[inside], second[inside]) and 0.5 < first[inside].std() < 1.5


def test_few_steps_are_taken_from_noise_unless_the_model_has_fewer(tiny_pipeline, tiny_unet):
    own = MoebiusInpaintPipeline.from_pipe(tiny_pipeline, default_num_inference_steps=2)
    assert own.use_few_steps(4) is own
    assert own.scheduler is tiny_pipeline.scheduler and own.config.default_num_inference_steps == 2

    pipe = MoebiusInpaintPipeline.from_pipe(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    timesteps = []
    pipe.use_few_steps(4)(photo(), hole(), callback_on_step_end=lambda _, i, t, kwargs: timesteps.append(int(t)) or {})
    assert timesteps == [999, 749, 499, 249]
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.scheduler.config.solver_order == 2
    assert isinstance(tiny_pipeline.scheduler, DDIMScheduler)
    with pytest.raises(ValueError, match="`num_inference_steps`"):
        pipe.use_few_steps(0)


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (5, {}, [1, 1, 2, 2, 2]),
        (4, {}, [1, 2, 2, 2]),
        (2, {}, [2, 2]),
        (1, {}, [2]),
        (5, {"guidance_start": 0.0}, [2, 2, 2, 2, 2]),
        (5, {"guidance_start": 0.2}, [1, 2, 2, 2, 2]),
        (5, {"guidance_end": 0.2}, [2, 1, 1, 1, 1]),
        (5, {"num_inference_steps": 10}, [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]),
        (5, {"guidance_scale": 1.0}, [1, 1, 1, 1, 1]),
    ],
)
def test_guidance_begins_late_with_few_steps(tiny_pipeline, steps, options, expected):
    pipe = MoebiusInpaintPipeline.from_pipe(tiny_pipeline).use_few_steps(steps)
    pipe.set_progress_bar_config(disable=True)
    sizes = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    pipe(photo(), hole(), **options)
    hook.remove()
    assert sizes == expected
