import copy
import io
import json
import logging
import threading

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel, MoebiusUNet2DOutput
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def photo(height=64, width=64, mode="RGB", seed=0):
    random = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width)).astype(np.uint16))
    image = Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(random.integers(0, 256, (height, width)).astype(np.uint8)))
        return image
    return image.convert(mode)


def hole(height=64, width=64, box=None):
    mask = np.zeros((height, width), bool)
    left, top, right, bottom = box or (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    mask[top:bottom, left:right] = True
    return mask


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make_pipeline(*components, **options):
    pipeline = MoebiusInpaintPipeline(*components, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_small_vae():
    """An AutoencoderTiny with random weights, 8 px a latent, scaling factor 1, no random draws."""
    torch.manual_seed(0)
    widths, blocks = (8, 8, 8, 8), (1, 1, 1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    ).eval()


@pytest.fixture(scope="module")
def smallest_pipe():
    """A pipeline that outlives the examples of a property test; its native size is 64 px."""
    vae = make_small_vae()
    unet = MoebiusUNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        num_attention_heads=2,
        cross_attention_dim=8,
        encoder_hid_dim=8,
        local_window_size=3,
        norm_num_groups=4,
    ).eval()
    return make_pipeline(vae, unet, LatentCategoriesEmbedder(20, 8), DDIMScheduler(**BETAS))


@pytest.fixture
def pipe(tiny_unet, tiny_lcg_embedder, tiny_scheduler):
    """The tiny pipeline with the cheaper autoencoder, for whatever does not depend on the autoencoder."""
    return make_pipeline(make_small_vae(), tiny_unet, tiny_lcg_embedder, tiny_scheduler)


@pytest.fixture
def unet_calls(tiny_unet):
    """The shapes of the denoiser's inputs, one a call."""
    calls = []
    tiny_unet.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    return calls


class OracleUNet(MoebiusUNet2DModel):
    """Knows the clean latents and predicts exactly what the scheduler asks for; keeps what it sees."""

    clean = None
    scheduler = None

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        noisy = sample[:, :4]
        alphas = self.scheduler.alphas_cumprod.double()
        alpha = float(np.interp(float(timestep), np.arange(len(alphas)), alphas))
        noise = (noisy - alpha**0.5 * self.clean) / (1 - alpha) ** 0.5
        self.found.append((noisy, noise))
        if self.scheduler.config.prediction_type == "v_prediction":
            noise = alpha**0.5 * noise - (1 - alpha) ** 0.5 * self.clean
        return (noise,) if not return_dict else MoebiusUNet2DOutput(sample=noise)


class TestParity:
    @pytest.fixture
    def released(self, parity_dir, tiny_vae):
        """The release's tiny student, pictures and numbers."""
        weights = load_file(parity_dir / "student_tiny.safetensors")
        config = json.loads((parity_dir / "student_tiny.json").read_text())
        unet = MoebiusUNet2DModel(
            sample_size=config["sample_size"],
            block_out_channels=config["block_out_channels"],
            num_attention_heads=config["attention_head_dim"],
            cross_attention_dim=config["cross_attention_dim"],
            encoder_hid_dim=config["encoder_hid_dim"],
            norm_num_groups=config["norm_num_groups"],
        )
        prefix = "diff_model."
        unet.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        embedder = LatentCategoriesEmbedder(config["num_embeddings"], config["encoder_hid_dim"])
        embedder.embedding_layer.weight.data = weights["embedding_layer.weight"]
        scheduler = DDIMScheduler(**BETAS, clip_sample=False)
        pipeline = make_pipeline(tiny_vae, unet.eval(), embedder, scheduler, default_guidance_scale=2.0)
        inputs = {
            "image": Image.open(parity_dir / "pipeline_image.png"),
            "mask_image": Image.open(parity_dir / "pipeline_mask.png"),
        }
        return pipeline, inputs, load_file(parity_dir / "pipeline_io.safetensors"), parity_dir

    @staticmethod
    def grey_levels(image, path):
        return np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(path)).astype(int)).max()

    def test_latents_and_raw_picture(self, released):
        pipeline, inputs, numbers, folder = released
        steps = []

        def record(pipeline, step, timestep, tensors):
            steps.append((int(timestep), tensors["latents"]))
            return tensors

        result = pipeline(
            **inputs,
            paste=None,
            latents=numbers["initial_latents"],
            masked_image_latents=numbers["masked_image_latents"],
            callback_on_step_end=record,
        ).images[0]
        assert [timestep for timestep, _ in steps] == numbers["timesteps"].tolist()
        for (_, latents), expected in zip(steps, numbers["all_steps"]):
            assert (latents - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert self.grey_levels(result, folder / "pipeline_raw.png") <= 1

    def test_seed_gives_the_release_s_picture(self, released):
        # The release drew from seed 0: posterior of the picture, of the masked picture, noise, noise offset.
        pipeline, inputs, _, folder = released
        result = pipeline(**inputs, paste="blur", generator=seeded(0)).images[0]
        assert self.grey_levels(result, folder / "pipeline_paste.png") <= 1

    def test_color_compensation(self, released):
        pipeline, inputs, numbers, folder = released
        result = pipeline(
            **inputs,
            paste="blur",
            color_compensation=True,
            latents=numbers["initial_latents"],
            masked_image_latents=numbers["masked_image_latents"],
        ).images[0]
        assert self.grey_levels(result, folder / "pipeline_compensate.png") <= 1


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
        foreground = embedder(embedder.category_ids("foreground"))[0]
        background = embedder(embedder.category_ids("background"))[0]
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

    def test_tokens_are_one_tensor_over_the_steps(self, pipe, tiny_unet):
        seen = []
        tiny_unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        pipe(photo(), hole(), strength=1.0, num_inference_steps=4, guidance_end=0.5)
        assert seen[0] is seen[1] and seen[2] is seen[3]


class TestPictures:
    MODES = {
        "RGB": "RGB",
        "RGBA": "RGBA",
        "L": "L",
        "LA": "LA",
        "1": "L",
        "P": "RGB",
        "CMYK": "CMYK",
        "I;16": "I;16",
    }

    @pytest.mark.parametrize("paste", ["exact", "seamless", "blur", None])
    def test_modes_come_back_and_the_outside_is_exact(self, pipe, paste):
        images = [photo(mode=mode) for mode in self.MODES]
        results = pipe(images, hole(), num_inference_steps=2, guidance_scale=1, paste=paste).images
        outside = ~hole()
        outside[4:-4, 4:-4] &= paste in ("exact", "seamless")  # the blur reaches 9 px beyond the hole
        for image, result, mode in zip(images, results, self.MODES.values()):
            assert result.mode == mode and result.size == image.size
            expected = np.asarray(image if mode == "I;16" else image.convert(mode))
            if paste is not None:
                np.testing.assert_array_equal(np.asarray(result)[outside], expected[outside])
            colors = [np.asarray(array)[hole()].reshape(1024, -1)[:, :1] for array in (result, expected)]
            assert (colors[0] != colors[1]).mean() > 0.9
            if mode in ("RGBA", "LA"):
                np.testing.assert_array_equal(np.asarray(result)[..., -1], expected[..., -1])

    def test_mixed_sizes_come_back_in_order(self, pipe, unet_calls):
        shapes = [(64, 64), (48, 100), (64, 64), (200, 300), (70, 90)]
        images = [photo(*shape, seed=i) for i, shape in enumerate(shapes)]
        masks = [hole(*shape) for shape in shapes]
        run = {"num_inference_steps": 2, "guidance_scale": 1}
        results = pipe(images, masks, generator=seeded(*range(5)), **run).images
        assert unet_calls[:4] == [(2, 9, 8, 8), (1, 9, 8, 16), (1, 9, 16, 24), (1, 9, 12, 12)]
        for i, (image, mask, result) in enumerate(zip(images, masks, results)):
            assert result.size == image.size
            np.testing.assert_array_equal(np.asarray(result)[~mask], np.asarray(image)[~mask])
            alone = pipe(image, mask, generator=seeded(i), **run).images[0]
            # The batch changes rounding only.
            assert np.abs(np.asarray(alone).astype(int) - np.asarray(result)).max() <= 1

    @pytest.mark.parametrize("form", ["np", "pt"])
    def test_arrays_and_tensors(self, pipe, form):
        random = np.random.default_rng(0)
        batch = random.random((2, 64, 80, 3), np.float32)
        mask = hole(64, 80)
        image = batch if form == "np" else torch.from_numpy(batch).permute(0, 3, 1, 2)
        results = pipe(image, mask, num_inference_steps=2, guidance_scale=1, output_type=form).images
        assert results.shape == tuple(image.shape) and results.dtype == image.dtype
        results = results if form == "np" else results.permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(results[:, ~mask], batch[:, ~mask])
        assert (results[:, mask] != batch[:, mask]).mean() > 0.9

        mixed = pipe(
            [batch[0], batch[1, :40]], [mask, mask[:40]], num_inference_steps=2, guidance_scale=1, output_type=form
        ).images
        assert isinstance(mixed, list) and [tuple(result.shape) for result in mixed] == (
            [(64, 80, 3), (40, 80, 3)] if form == "np" else [(3, 64, 80), (3, 40, 80)]
        )

    def test_sixteen_bit_colour(self, pipe):
        deep = np.random.default_rng(0).integers(0, 65536, (64, 64, 3)).astype(np.uint16)
        result = pipe(deep, hole(), num_inference_steps=2, guidance_scale=1, output_type="np").images[0]
        np.testing.assert_array_equal(np.rint(result * 65535)[~hole()], deep[~hole()])

    @settings(max_examples=8)
    @given(
        st.tuples(st.integers(16, 150), st.integers(16, 150)),
        st.tuples(*[st.floats(0, 1)] * 4),
        st.sampled_from([None, 0, 7]),
    )
    def test_any_size_comes_back_exact_outside(self, smallest_pipe, size, corners, padding_mask_crop):
        height, width = size
        top, bottom = sorted(round(corner * height) for corner in corners[:2])
        left, right = sorted(round(corner * width) for corner in corners[2:])
        mask = hole(height, width, (left, top, right, bottom))
        image = photo(height, width)
        result = smallest_pipe(
            image, mask, num_inference_steps=1, strength=1.0, guidance_scale=1, padding_mask_crop=padding_mask_crop
        ).images[0]
        assert result.size == image.size
        np.testing.assert_array_equal(np.asarray(result)[~mask], np.asarray(image)[~mask])

    def test_working_sizes(self, pipe, unet_calls):
        for (height, width), options, expected in [
            ((64, 64), {}, (8, 8)),
            ((160, 150), {}, (20, 20)),
            ((300, 200), {}, (24, 16)),
            ((32, 40), {}, (16, 16)),
            ((100, 64), {"height": 64, "width": 96}, (8, 12)),
            ((100, 200), {"height": 64}, (8, 16)),
        ]:
            unet_calls.clear()
            image = photo(height, width)
            result = pipe(image, hole(height, width), num_inference_steps=2, guidance_scale=1, **options).images[0]
            assert result.size == image.size
            assert unet_calls[0][2:] == expected, (height, width)

    def test_crop_works_on_the_box_alone(self, pipe, unet_calls):
        image, mask = photo(400, 600), hole(400, 600, (300, 200, 350, 260))
        for margin, expected in [(10, (12, 12)), (0, (16, 16)), (40, (20, 20)), (None, (16, 24))]:
            unet_calls.clear()
            result = pipe(image, mask, num_inference_steps=2, guidance_scale=1, padding_mask_crop=margin).images[0]
            assert unet_calls[0][2:] == expected, margin
            np.testing.assert_array_equal(np.asarray(result)[~mask], np.asarray(image)[~mask])
            assert (np.asarray(result)[mask] != np.asarray(image)[mask]).mean() > 0.9
        raw = pipe(image, mask, num_inference_steps=2, guidance_scale=1, padding_mask_crop=10, paste=None).images[0]
        changed = np.argwhere((np.asarray(raw) != np.asarray(image)).any(axis=2))
        assert changed.min(axis=0).tolist() == [190, 290] and changed.max(axis=0).tolist() == [269, 359]

    def test_mask_dilation(self, pipe):
        image, mask, grown = photo(), hole(box=(20, 20, 40, 40)), hole(box=(15, 15, 45, 45))
        run = {"num_inference_steps": 2, "guidance_scale": 1}
        result = pipe(image, mask, mask_dilation=5, generator=seeded(0), **run).images[0]
        np.testing.assert_array_equal(np.asarray(result)[~grown], np.asarray(image)[~grown])
        np.testing.assert_array_equal(result, pipe(image, grown, generator=seeded(0), **run).images[0])

    def test_empty_mask_is_the_picture_with_a_warning(self, pipe, unet_calls, caplog):
        empty = np.zeros((64, 64), bool)
        images = [photo(mode="RGBA"), photo(seed=1)]
        with caplog.at_level(logging.WARNING):
            results = pipe(images[0], empty, padding_mask_crop=32, num_images_per_prompt=2).images
        assert "`mask_image` is empty" in caplog.text and not unet_calls
        assert len(results) == 2
        for result in results:
            np.testing.assert_array_equal(result, images[0])
        results = pipe(images, [empty, hole()], num_inference_steps=2, output_type="np").images
        assert {shape[0] for shape in unet_calls} == {2}  # one picture, two branches
        np.testing.assert_array_equal(np.rint(results[0] * 255), images[0])
        latents = pipe(images[0], empty, num_inference_steps=2, output_type="latent").images
        assert latents.shape == (1, 4, 8, 8)

    def test_latent_output(self, pipe):
        run = {"num_inference_steps": 2, "guidance_scale": 1, "output_type": "latent"}
        assert pipe(photo(), hole(), num_images_per_prompt=2, **run).images.shape == (2, 4, 8, 8)
        mixed = pipe([photo(), photo(64, 96)], [hole(), hole(64, 96)], **run).images
        assert [tuple(latents.shape) for latents in mixed] == [(4, 8, 8), (4, 8, 12)]

    def test_return_dict(self, pipe):
        result = pipe(photo(), hole(), num_inference_steps=2, return_dict=False)
        assert isinstance(result, tuple) and len(result) == 1 and result[0][0].size == (64, 64)

    def test_metadata_of_pillow_pictures(self, pipe):
        image = photo()
        image.info["icc_profile"] = b"profile"
        assert pipe(image, hole(), num_inference_steps=2).images[0].info["icc_profile"] == b"profile"


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


class TestCallbacks:
    RUN = {"num_inference_steps": 4, "strength": 1.0, "output_type": "latent"}

    def test_returned_tensors_replace_those_of_the_call(self, pipe, tiny_unet):
        names = MoebiusInpaintPipeline._callback_tensor_inputs
        shapes, seen = {}, []
        tiny_unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
        )

        def replace(pipeline, step, timestep, tensors):
            shapes.update({name: tuple(tensor.shape) for name, tensor in tensors.items()})
            return {name: torch.full_like(tensor, step) for name, tensor in tensors.items()}

        result = pipe(
            photo(),
            hole(),
            callback_on_step_end=replace,
            callback_on_step_end_tensor_inputs=names,
            guidance_end=0.75,
            **self.RUN,
        ).images
        assert shapes == {
            "latents": (1, 4, 8, 8),
            "category_embeds": (2, 10, 24),
            "mask": (1, 1, 8, 8),
            "masked_image_latents": (1, 4, 8, 8),
        }
        for step, (sample, embeds) in enumerate(seen[1:]):
            assert (sample == step).all() and (embeds == step).all()
        assert seen[-1][1].shape == (1, 10, 24)  # the last step is unguided
        assert (result == 3).all()

    def test_a_callback_may_change_the_guidance(self, pipe, unet_calls):
        def cut(pipeline, step, timestep, tensors):
            if step == 1:
                pipeline._guidance_scale = 0.0
            return tensors

        pipe(photo(), hole(), callback_on_step_end=cut, **self.RUN)
        assert [shape[0] for shape in unet_calls] == [2, 2, 1, 1]

    def test_pipeline_callbacks(self, pipe):
        steps = []

        class Record(PipelineCallback):
            tensor_inputs = ["latents", "mask"]

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                steps.append((step_index, sorted(callback_kwargs)))
                return callback_kwargs

        callback = MultiPipelineCallbacks([Record(cutoff_step_ratio=0.5)])
        pipe(photo(), hole(), callback_on_step_end=callback, **self.RUN)
        assert steps == [(step, ["latents", "mask"]) for step in range(4)]

    def test_interrupt(self, pipe, unet_calls):
        def stop(pipeline, step, timestep, tensors):
            pipeline._interrupt = step == 1
            return tensors

        images, masks = [photo(), photo(64, 96)], [hole(), hole(64, 96)]
        results = pipe(images, masks, callback_on_step_end=stop, **self.RUN | {"output_type": "pil"}).images
        assert pipe.interrupt and len(unet_calls) == 2
        assert (np.asarray(results[0])[hole()] != np.asarray(images[0])[hole()]).any()
        np.testing.assert_array_equal(results[1], images[1])  # had not begun
        pipe(photo(), hole(), **self.RUN)
        assert not pipe.interrupt and len(unet_calls) == 6

    def test_progress_bar(self, pipe):
        stream = io.StringIO()
        pipe.set_progress_bar_config(file=stream)
        pipe([photo(), photo(64, 96)], [hole(), hole(64, 96)], **self.RUN)
        assert "8/8" in stream.getvalue()
        assert pipe.num_timesteps == 4

    def test_threads_do_not_disturb_each_other(self, pipe):
        jobs = [
            {"num_inference_steps": steps, "guidance_scale": scale, "image": photo(seed=steps), "mask_image": hole()}
            for steps, scale in [(5, 1.0), (3, 3.0), (4, 2.0)]
        ]
        for job in jobs:
            job |= {"output_type": "latent", "callback_on_step_end": lambda pipeline, step, timestep, tensors: tensors}
        expected = [pipe(**job, generator=seeded(i)).images for i, job in enumerate(jobs)]
        results = [None] * len(jobs)
        start = threading.Barrier(len(jobs))

        def work(i):
            start.wait()
            results[i] = pipe(**jobs[i], generator=seeded(i)).images

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result, wanted in zip(results, expected):
            torch.testing.assert_close(result, wanted)


class TestComponents:
    RUN = {"num_inference_steps": 2, "guidance_scale": 1}

    def record_vae_dtypes(self, vae):
        dtypes = []
        vae.encoder.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        vae.decoder.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        return dtypes

    def test_half_precision_vae_runs_in_float32(self, tiny_pipeline, caplog):
        expected = tiny_pipeline(photo(), hole(), generator=seeded(0), **self.RUN).images[0]
        tiny_pipeline.vae.half()
        dtypes = self.record_vae_dtypes(tiny_pipeline.vae)
        result = tiny_pipeline(photo(), hole(), generator=seeded(0), **self.RUN).images[0]
        assert dtypes == [torch.float32] * 3
        assert tiny_pipeline.vae.dtype == torch.float16
        assert np.abs(np.asarray(result).astype(int) - np.asarray(expected)).max() <= 8

    def test_half_precision_vae_in_threads(self, tiny_pipeline):
        tiny_pipeline.vae.half()
        expected = tiny_pipeline(photo(), hole(), generator=seeded(0), **self.RUN).images[0]
        results = [None] * 3

        def work(i):
            results[i] = tiny_pipeline(photo(), hole(), generator=seeded(0), **self.RUN).images[0]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            np.testing.assert_array_equal(result, expected)
        assert tiny_pipeline.vae.dtype == torch.float16

    def test_vae_runs_outside_autocast(self, tiny_pipeline):
        dtypes = self.record_vae_dtypes(tiny_pipeline.vae)
        with torch.autocast("cpu", torch.bfloat16):
            tiny_pipeline(photo(), hole(), **self.RUN)
        assert dtypes == [torch.float32] * 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_whole_pipeline_in_half_precision(self, pipe, dtype):
        expected = pipe(photo(), hole(), generator=seeded(0), output_type="latent", **self.RUN).images
        pipe.to(dtype)
        result = pipe(photo(), hole(), generator=seeded(0), output_type="latent", **self.RUN).images
        assert result.dtype == torch.float32  # the scheduler's arithmetic
        assert (result - expected).abs().max() < 0.1 * expected.abs().max()
        assert pipe(photo(), hole(), **self.RUN).images[0].size == (64, 64)

    def test_not_a_number_is_an_error(self, pipe):
        with pytest.raises(ValueError, match="NaN"):
            pipe(photo(), hole(), latents=torch.full((1, 4, 8, 8), torch.nan), **self.RUN)

    def test_vae_slicing_and_tiling(self, tiny_pipeline):
        images = [photo(seed=i) for i in range(2)]
        expected = tiny_pipeline(images, hole(), generator=seeded(0, 1), output_type="np", **self.RUN).images
        tiny_pipeline.enable_vae_slicing()
        assert tiny_pipeline.vae.use_slicing
        sliced = tiny_pipeline(images, hole(), generator=seeded(0, 1), output_type="np", **self.RUN).images
        np.testing.assert_allclose(sliced, expected, atol=1e-2)
        tiny_pipeline.disable_vae_slicing()
        assert not tiny_pipeline.vae.use_slicing
        tiny_pipeline.enable_vae_tiling()
        assert tiny_pipeline.vae.use_tiling
        tiny_pipeline.vae.tile_sample_min_size, tiny_pipeline.vae.tile_latent_min_size = 64, 8
        assert tiny_pipeline(photo(96, 96), hole(96, 96), **self.RUN).images[0].size == (96, 96)
        tiny_pipeline.disable_vae_tiling()
        assert not tiny_pipeline.vae.use_tiling

    @pytest.mark.parametrize("offload", ["model", "sequential", "block_level", "leaf_level"])
    def test_offloading(self, tiny_pipeline, offload):
        # The same hooks as on a GPU, with the CPU as the device that computes.
        run = {"image": photo(), "mask_image": hole(), "num_inference_steps": 2, "output_type": "np"}
        expected = tiny_pipeline(**run, generator=seeded(0)).images
        if offload == "model":
            tiny_pipeline.enable_model_cpu_offload(device="cpu")
        elif offload == "sequential":
            # What `enable_sequential_cpu_offload` does; it names the device "cpu:0", which accelerate does not take.
            for model in (tiny_pipeline.vae, tiny_pipeline.unet, tiny_pipeline.lcg_embedder):
                cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
            assert tiny_pipeline.lcg_embedder.embedding_layer.weight.device.type == "meta"
        else:
            tiny_pipeline.enable_group_offload(torch.device("cpu"), offload_type=offload, num_blocks_per_group=1)
        for _ in range(2):
            np.testing.assert_allclose(tiny_pipeline(**run, generator=seeded(0)).images, expected, atol=1e-2)

    def test_from_pipe_shares_components(self, pipe):
        pipe.unet.half()
        other = MoebiusInpaintPipeline.from_pipe(pipe, scheduler=EulerDiscreteScheduler(**BETAS))
        assert other.unet is pipe.unet and other.vae is pipe.vae and other.lcg_embedder is pipe.lcg_embedder
        assert isinstance(other.scheduler, EulerDiscreteScheduler) and isinstance(pipe.scheduler, DDIMScheduler)
        assert other.unet.dtype == torch.float16 and other.vae.dtype == torch.float32
        assert MoebiusInpaintPipeline.from_pipe(pipe, torch_dtype=torch.float32).unet.dtype == torch.float32


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"image": Image.new("RGB", (1, 1)), "mask_image": Image.new("L", (1, 1), 255)}, "image"),
            ({"image": Image.new("RGB", (0, 0))}, "image"),
            ({"image": Image.new("RGB", (20000, 10)), "mask_image": Image.new("L", (20000, 10), 255)}, "image"),
            ({"image": Image.new("RGB", (20000, 64)), "mask_image": Image.new("L", (20000, 64), 255)}, "image"),
            ({"image": np.full((64, 64, 3), np.nan, np.float32)}, "image"),
            ({"image": [photo(), photo()], "mask_image": [hole(), hole(), hole()]}, "mask_image"),
            ({"mask_image": hole(32, 64)}, "mask_image"),
            ({"mask_image": photo(mode="L")}, "mask_image"),
            ({"num_inference_steps": 0}, "num_inference_steps"),
            ({"num_inference_steps": -3}, "num_inference_steps"),
            ({"num_inference_steps": 2.5}, "num_inference_steps"),
            ({"num_inference_steps": 1}, "strength"),
            ({"strength": 0.0}, "strength"),
            ({"strength": 1.01}, "strength"),
            ({"strength": float("nan")}, "strength"),
            ({"masked_content": "latent nothing"}, "masked_content"),
            ({"masked_content": "fill", "strength": 1.0}, "masked_content"),
            ({"guidance_scale": float("inf")}, "guidance_scale"),
            ({"guidance_start": -0.1}, "guidance_start"),
            ({"guidance_start": 0.6, "guidance_end": 0.5}, "guidance_start"),
            ({"guidance_end": 1.1}, "guidance_end"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
            ({"eta": -1.0}, "eta"),
            ({"noise_offset": float("nan")}, "noise_offset"),
            ({"mask_dilation": -1}, "mask_dilation"),
            ({"padding_mask_crop": -1}, "padding_mask_crop"),
            ({"padding_mask_crop": 1.5}, "padding_mask_crop"),
            ({"height": 100}, "height"),
            ({"width": 0}, "width"),
            ({"height": 64.0}, "height"),
            ({"paste": "Exact"}, "paste"),
            ({"output_type": "png"}, "output_type"),
            ({"timesteps": []}, "timesteps"),
            ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end_tensor_inputs"),
            ({"generator": seeded(0, 1, 2)}, "generator"),
            ({"generator": 42}, "generator"),
            ({"generator": [42]}, "generator"),
            ({"latents": torch.zeros(1, 4, 16, 16)}, "latents"),
            ({"latents": torch.zeros(2, 4, 8, 8)}, "latents"),
            ({"masked_image_latents": torch.zeros(1, 3, 8, 8)}, "masked_image_latents"),
        ],
    )
    def test_is_refused_by_name_before_anything_runs(self, smallest_pipe, monkeypatch, options, name):
        monkeypatch.setattr(smallest_pipe, "encode_image", lambda *args: pytest.fail("the picture was encoded"))
        with pytest.raises(ValueError, match=f"`{name}`"):
            smallest_pipe(**{"image": photo(), "mask_image": hole(), **options})


def test_prepared_pipeline_gives_the_same_picture_and_cannot_be_saved(tiny_pipeline, tmp_path):
    image = Image.new("RGB", (64, 64), "teal")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 20:44] = 255
    call = {"image": image, "mask_image": mask, "num_inference_steps": 3}
    expected = tiny_pipeline(**call, generator=torch.manual_seed(0)).images[0]
    assert tiny_pipeline.prepare_for_inference() is tiny_pipeline
    result = tiny_pipeline(**call, generator=torch.manual_seed(0)).images[0]
    assert np.abs(np.asarray(result, int) - np.asarray(expected, int)).max() <= 1
    with pytest.raises(ValueError, match="fused"):
        tiny_pipeline.save_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("masked_content", ["original", "fill", "noise"])
def test_start_depends_on_the_hole_only_with_the_original(smallest_pipe, masked_content):
    starts = []
    smallest_pipe = MoebiusInpaintPipeline.from_pipe(smallest_pipe)
    smallest_pipe.set_progress_bar_config(disable=True)

    def spy(image_latents, noise, scheduler, timestep):
        starts.append((image_latents, noise))
        return MoebiusInpaintPipeline.prepare_latents(smallest_pipe, image_latents, noise, scheduler, timestep)

    smallest_pipe.prepare_latents = spy
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
        flat = smallest_pipe.encode_image(torch.full((1, 3, 64, 64), 2 * 80 / 255 - 1), 1, None, torch.device("cpu"))
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


def test_prepared_pipeline_agrees_with_the_reference_processors_over_20_steps(tiny_pipeline):
    generator = torch.Generator().manual_seed(3)
    for module in tiny_pipeline.unet.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    call = {"image": photo(96, 64), "mask_image": hole(96, 64), "num_inference_steps": 20, "output_type": "latent"}
    tiny_pipeline.unet.set_lambda_algorithm("reference")
    expected = tiny_pipeline(**call, generator=seeded(0)).images
    tiny_pipeline.unet.set_lambda_algorithm("fast")
    result = tiny_pipeline.prepare_for_inference()(**call, generator=seeded(0)).images
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("size", [(128, 128), (64, 96)])
def test_context_is_read_once_a_run_and_never_kept_for_the_next(tiny_pipeline, size):
    layer = tiny_pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    reads = []
    layer.to_k.register_forward_hook(lambda module, args, output: reads.append(len(output)))
    call = {"image": photo(*size), "mask_image": hole(*size), "num_inference_steps": 4, "strength": 1.0}
    call |= {"guidance_start": 0.5, "output_type": "latent"}
    cached = tiny_pipeline(**call, generator=seeded(0)).images
    assert reads == [1, 2]  # the background alone, then both
    changed = tiny_pipeline(**call, generator=seeded(0), callback_on_step_end=lambda *_: {}).images
    assert reads[2:] == [1, 1, 2, 2]  # a callback may change what is read
    assert torch.equal(cached, changed)
    layer.to_k.weight.data.mul_(-3)
    tiny_pipeline.lcg_embedder.embedding_layer.weight.data.mul_(2)
    assert not torch.equal(tiny_pipeline(**call, generator=seeded(0)).images, cached)
    assert reads[6:] == [1, 2]
