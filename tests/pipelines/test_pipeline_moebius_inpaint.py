import json
import logging
import threading

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from small_parts import BETAS, hole, make_pipeline, photo, seeded

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


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
            ({"mask_threshold": 0.0}, "mask_threshold"),
            ({"mask_source": "red"}, "mask_source"),
            ({"mask_source": "alpha"}, "mask_source"),
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
            ({"detail": "Patches"}, "detail"),
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
        monkeypatch.setattr(smallest_pipe.vae, "encode", lambda *args: pytest.fail("the picture was encoded"))
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
