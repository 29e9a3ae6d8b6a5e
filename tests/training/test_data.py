import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moebius.training.data import ResumableBatchSampler
from diffusers_moebius.training.latents import (
    LatentCacheDataset,
    build_latent_cache,
    encode_latents,
    hole_at_latent_size,
    mask_to_latent_size,
)
from diffusers_moebius.training.picture_datasets import PictureDataset, picture_to_tensor, random_resized_crop
from diffusers_moebius.training.picture_sources import PictureReader

PRESETS = ["medium_512", "thick_256"]


def test_folder_and_shard_give_the_same_pictures_and_report_the_unreadable(photo_dir, shard):
    from_folder, from_shard = PictureReader([photo_dir]), PictureReader([str(shard.parent / "photos-*.tar")])
    assert len(from_folder) == len(from_shard) == 13  # the mask is no picture
    pictures = [[reader.read(index) for index in range(13)] for reader in (from_folder, from_shard)]
    for reader, read in zip((from_folder, from_shard), pictures):
        assert sum(picture is None for picture in read) == 1
        assert len(reader.skipped) == 1 and next(iter(reader.skipped)).endswith("03-broken.jpg")
        assert all(picture.size == (48, 40) and picture.mode == "RGB" for picture in read if picture)
    contents = [sorted(picture.tobytes() for picture in read if picture) for read in pictures]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("missing", ["nothing", "empty"])
def test_sources_without_pictures_are_refused(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`sources`"):
        PictureReader([tmp_path / missing])


def test_crop_is_square_and_inside_the_picture():
    picture = Image.new("RGB", (60, 30), (10, 200, 30))
    for seed in range(20):
        crop = random_resized_crop(picture, 16, np.random.default_rng(seed), scale=(0.2, 1.0))
        assert crop.size == (16, 16)
        assert np.ptp(np.asarray(crop), axis=(0, 1)).max() == 0  # nothing from beyond the border


def test_half_of_the_crops_are_mirrored():
    picture = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 3)))
    rising = 0
    for seed in range(60):
        row = np.asarray(random_resized_crop(picture, 16, np.random.default_rng(seed)))[8, :, 0].astype(int)
        rising += row[-1] > row[0]
    assert 15 < rising < 45


def test_samples_depend_on_seed_epoch_and_index_alone(photo_dir):
    dataset = PictureDataset(PictureReader([photo_dir]), 32, PRESETS, seed=5)
    again = PictureDataset(PictureReader([photo_dir]), 32, PRESETS, seed=5)
    first, same = dataset[2], again[2]
    assert torch.equal(first["pixel_values"], same["pixel_values"]) and torch.equal(first["mask"], same["mask"])
    next_epoch = dataset[2 + len(dataset)]
    assert not torch.equal(first["mask"], next_epoch["mask"])
    assert first["pixel_values"].shape == (3, 32, 32) and first["mask"].shape == (1, 32, 32)
    assert first["pixel_values"].min() >= -1 and first["pixel_values"].max() <= 1
    assert set(first["mask"].unique().tolist()) == {0.0, 1.0}


def test_cache_round_trip(photo_dir, tmp_path, tiny_vae):
    tiny_vae.encode = lambda pixels: type("Output", (), {"latents": pixels[:, :, ::8, ::8] * 2})  # exact in float16
    dataset = PictureDataset(PictureReader([photo_dir]), 32, PRESETS, seed=3)
    build_latent_cache(tiny_vae, dataset, tmp_path / "cache", 2, crops_per_picture=2, shard_size=5)
    cache = LatentCacheDataset(tmp_path / "cache")
    assert len(cache) == 2 * 12 * 2  # crops, readable pictures, masks
    assert list(dataset.reader.skipped.values()) == [2]

    readable = [index for index in range(2 * 13) if dataset.reader.read(index % 13) is not None]
    for position, index in enumerate(readable):
        pixels, masks = dataset.crop(index, 2)
        for number in range(2):
            sample = cache[2 * position + number]
            mask = masks[number]
            assert torch.equal(sample["mask"], mask)
            for name, picture in (("latents", pixels), ("masked_latents", pixels * (1 - mask))):
                expected = encode_latents(tiny_vae, picture[None])[0]
                torch.testing.assert_close(sample[name], expected, atol=2e-3, rtol=2e-3)


def test_interrupted_cache_goes_on_and_other_settings_are_refused(photo_dir, tmp_path, tiny_vae):
    dataset = PictureDataset(PictureReader([photo_dir]), 32, PRESETS)
    calls = []

    def stop_after_two(done, total):
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_latent_cache(tiny_vae, dataset, tmp_path, 1, shard_size=4, progress=stop_after_two)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("latents-*")}
    assert len(kept) == 2
    build_latent_cache(tiny_vae, dataset, tmp_path, 1, shard_size=4)
    assert len(LatentCacheDataset(tmp_path)) == 12
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert json.loads((tmp_path / "cache.json").read_text())["resolution"] == 32

    with pytest.raises(ValueError, match="`cache_dir`"):
        build_latent_cache(tiny_vae, dataset, tmp_path, 2, shard_size=4)
    with pytest.raises(ValueError, match="`cache_dir`"):
        LatentCacheDataset(tmp_path / "elsewhere")


def test_hole_at_latent_size_covers_every_touched_cell():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 7:9, 15] = 1  # touches two cells, and neither at its first pixel's column
    assert hole_at_latent_size(mask, (4, 4)).nonzero()[:, 2:].tolist() == [[0, 1], [1, 1]]
    assert mask_to_latent_size(mask, (4, 4)).sum() == 0


def test_batches_resume_and_are_dealt_to_processes():
    def take(count, **kwargs):
        batches = iter(ResumableBatchSampler(10, 3, seed=1, **kwargs))
        return [next(batches) for _ in range(count)]

    whole = take(8)
    assert take(5, first_batch=3) == whole[3:]
    assert take(4, num_processes=2) == whole[0::2]
    assert take(4, num_processes=2, process_index=1) == whole[1::2]
    assert take(2, num_processes=2, process_index=1, first_batch=2) == whole[5::2]
    for epoch in range(2):
        indices = [index for batch in whole[3 * epoch : 3 * epoch + 3] for index in batch]
        assert len(set(indices)) == 9 and all(10 * epoch <= index < 10 * epoch + 10 for index in indices)
    with pytest.raises(ValueError, match="`batch_size`"):
        ResumableBatchSampler(2, 3, seed=0)


def test_picture_to_tensor_spans_minus_one_to_one():
    picture = Image.fromarray(np.array([[[0, 255, 0], [255, 0, 255]]], dtype=np.uint8))
    assert picture_to_tensor(picture).tolist() == [[[-1, 1]], [[1, -1]], [[-1, 1]]]
