"""One photo: read with its mask, and filled."""

import http.server
import threading
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from photo_files import HOLE, contents, mask_image, photo_image
from PIL import Image

from diffusers_moebius import loaders
from diffusers_moebius.batch.photo import Item, MaskOptions, fill_photos, prepare_pipeline, read_photo


def item(mask=None, photo=None, key="a.png"):
    return Item(key, contents(photo or photo_image()), [contents(mask or mask_image())])


@pytest.mark.parametrize("dilation, left, grown", [(None, 4, 4), (None, 1, 2), (None, 0, 0), (3, 0, 3), (0, 4, 0)])
def test_masks_grow(dilation, left, grown):
    """By default over what is left of an object."""
    image = Image.new("RGB", (512, 600), "green")
    image.paste("red", (HOLE[0] - left, HOLE[1] - left, HOLE[2] + left, HOLE[3] + left))
    photo = read_photo(item(mask_image(image.size), image), MaskOptions(dilation=dilation))
    expected = np.zeros((600, 512), bool)
    expected[HOLE[1] - grown : HOLE[3] + grown, HOLE[0] - grown : HOLE[2] + grown] = True
    assert np.array_equal(photo.mask, expected)
    assert photo.remarks == []


def test_remarks_name_the_mask():
    full, empty = mask_image().point(lambda value: 255), mask_image().point(lambda value: 0)
    (remark,) = read_photo(item(full), MaskOptions()).remarks
    assert remark.startswith("the mask of a.png: 100% of the photo is filled")
    (remark,) = read_photo(item(empty), MaskOptions()).remarks
    assert "nothing is filled, so a.png stays" in remark


@pytest.mark.parametrize(
    "broken, words",
    [
        (Item("a.png", b"text", [contents(mask_image())]), "a.png is not a picture"),
        (Item("a.png", contents(photo_image()), [b"text"]), "the mask of a.png is not a picture"),
        (Item("a.png", contents(photo_image()), []), "a.png must have one mask .* has 0"),
        (Item("a.png", contents(photo_image()), [b"", b""]), "a.png must have one mask .* has 2"),
        (item(mask_image((30, 60))), "the mask of a.png with a.png: `mask_image` is 30×60"),
    ],
)
def test_what_cannot_be_read_is_named(broken, words):
    with pytest.raises(ValueError, match=words):
        read_photo(broken, MaskOptions())


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_addresses_are_fetched(tmp_path):
    (tmp_path / "a.png").write_bytes(contents(photo_image()))
    handler = partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        photo = read_photo(Item("a.png", f"{address}/a.png", [contents(mask_image())]), MaskOptions())
        assert np.array_equal(photo.image, photo_image())
        with pytest.raises(OSError, match="404"):
            read_photo(Item("b.png", f"{address}/b.png", [contents(mask_image())]), MaskOptions())
        server.shutdown()


class TestFillPhotos:
    options = {"num_inference_steps": 2, "padding_mask_crop": 8}

    def read(self, *seeds):
        return [read_photo(item(photo=photo_image(seed)), MaskOptions(dilation=0)) for seed in seeds]

    def test_the_result_does_not_depend_on_the_others(self, tiny_pipeline):
        together = fill_photos(tiny_pipeline, self.read(0, 1, 2), 5, self.options)
        for seed, result in enumerate(together):
            (alone,) = fill_photos(tiny_pipeline, self.read(seed), 5, self.options)
            # A batch of another size rounds in another order.
            assert np.abs(np.asarray(alone, int) - np.asarray(result, int)).max() <= 1
            outside = ~self.read(seed)[0].mask
            assert np.array_equal(np.asarray(result)[outside], np.asarray(photo_image(seed))[outside])

    def test_a_photo_that_cannot_be_done_costs_no_other(self, tiny_pipeline):
        photos = self.read(0, 1)
        line = Item("line.png", contents(photo_image(size=(1000, 20))), [contents(mask_image((1000, 20)))])
        photos.insert(1, read_photo(line, MaskOptions()))
        results = fill_photos(tiny_pipeline, photos, 0, {"num_inference_steps": 2})
        assert isinstance(results[1], ValueError) and "1000×20" in str(results[1])
        assert [result.size for result in (results[0], results[2])] == [(48, 40)] * 2

    def test_memory_that_only_suffices_for_one(self, tiny_pipeline, monkeypatch):
        call, sizes = type(tiny_pipeline).__call__, []

        def small(self, **arguments):
            sizes.append(len(arguments["image"]))
            if sizes[-1] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return call(self, **arguments)

        monkeypatch.setattr(type(tiny_pipeline), "__call__", small)
        results = fill_photos(tiny_pipeline, self.read(0, 1), 0, self.options)
        assert sizes == [2, 1, 1] and all(result.size == (48, 40) for result in results)


def test_a_prepared_pipeline_takes_its_own_steps_and_decoder(tiny_pipeline):
    prepare_pipeline(tiny_pipeline, fast=False)
    assert tiny_pipeline.unet.is_fused and tiny_pipeline.tiny_vae is None
    assert tiny_pipeline.config.default_num_inference_steps == 20


def test_a_fast_pipeline_decodes_by_a_tiny_autoencoder_of_the_same_latents(tiny_pipeline, tmp_path, monkeypatch):
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    tiny.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(loaders, "TINY_AUTOENCODER", str(tmp_path / "tiny"))
    tiny_pipeline.vae.register_to_config(scaling_factor=0.18215)  # that of other latents
    prepare_pipeline(tiny_pipeline, fast=True)
    assert tiny_pipeline.config.default_num_inference_steps == 5 and tiny_pipeline.tiny_vae is None
    tiny_pipeline.vae.register_to_config(scaling_factor=0.13025)
    prepare_pipeline(tiny_pipeline, fast=True)
    assert isinstance(tiny_pipeline.tiny_vae, AutoencoderTiny)


def test_a_fast_pipeline_does_without_a_tiny_autoencoder_that_cannot_be_loaded(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "TINY_AUTOENCODER", str(tmp_path))
    with pytest.warns(UserWarning, match="own decoder"):
        prepare_pipeline(tiny_pipeline, fast=True)
    assert tiny_pipeline.tiny_vae is None and tiny_pipeline.unet.is_fused
