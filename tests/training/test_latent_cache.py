import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from runs import open_data

from diffusers_moebius.pipelines.latents import encode_latents
from diffusers_moebius.training.crops import Cropper
from diffusers_moebius.training.data import PictureDataset, TrainingBatches
from diffusers_moebius.training.latent_cache import (
    LatentCacheDataset,
    build_latent_cache,
    hole_at_latent_size,
    mask_to_latent_size,
)
from diffusers_moebius.training.picture_sources import list_pictures, read_picture

PRESETS = ["medium_512", "thick_256"]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr("diffusers_moebius.training.data.CACHE_UNIT", 4)


def test_cache_round_trip(photo_dir, tmp_path, tiny_vae):
    tiny_vae.encode = lambda pixels: type("Output", (), {"latents": pixels[:, :, ::8, ::8] * 2})  # exact in float16
    dataset = PictureDataset(list_pictures([photo_dir]), Cropper(32, PRESETS, seed=3))
    build_latent_cache(tiny_vae, dataset, tmp_path / "cache", 2, crops_per_picture=2)
    cache = LatentCacheDataset(tmp_path / "cache")
    assert len(cache) == 2 * 12 * 2  # crops, readable pictures, masks
    assert len(LatentCacheDataset(tmp_path / "cache", max_samples=3)) == 3 * 2

    readable = [index for index in range(2 * 13) if read_picture(dataset.records[index % 13]) is not None]
    for position, index in enumerate(readable):
        crop = dataset.cropper(dataset.records[index % 13], divmod(index, 13), 2)
        pixels, masks = crop["pixel_values"], crop["mask"]
        for number in range(2):
            sample = cache[2 * position + number]
            mask = masks[number]
            assert torch.equal(sample["mask"], mask)
            for name, picture in (("latents", pixels), ("masked_latents", pixels * (1 - mask))):
                expected = encode_latents(tiny_vae, picture[None])[0]
                torch.testing.assert_close(sample[name], expected, atol=2e-3, rtol=2e-3)


def test_other_settings_and_pictures_are_refused(photo_dir, tmp_path, tiny_vae):
    dataset = PictureDataset(list_pictures([photo_dir]), Cropper(32, PRESETS))
    build_latent_cache(tiny_vae, dataset, tmp_path / "cache", 1)
    assert json.loads((tmp_path / "cache/cache.json").read_text())["resolution"] == 32
    with pytest.raises(ValueError, match="`cache_dir`"):
        build_latent_cache(tiny_vae, dataset, tmp_path / "cache", 2)
    (photo_dir / "00.png").unlink()
    with pytest.raises(ValueError, match="'pictures': 12"):
        build_latent_cache(
            tiny_vae, PictureDataset(list_pictures([photo_dir]), Cropper(32, PRESETS)), tmp_path / "cache", 1
        )
    with pytest.raises(ValueError, match=r"`cache_dir`.*holds none"):
        LatentCacheDataset(tmp_path / "elsewhere")


def test_cache_of_unreadable_pictures_alone_is_refused(tmp_path, tiny_vae):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/broken.jpg").write_text("no picture")
    data = PictureDataset(list_pictures([tmp_path / "photos"]), Cropper(32, PRESETS))
    build_latent_cache(tiny_vae, data, tmp_path / "cache", 1)
    with pytest.raises(ValueError, match="none of its pictures was readable"):
        LatentCacheDataset(tmp_path / "cache")


@pytest.fixture
def categorised(tmp_path):
    """Two shards of seven pictures: foreground, background and without a category in turn; one is unreadable."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"photos-{shard}.tar", "w") as archive:
            for number in range(7):
                files = {}
                for suffix, picture in (
                    ("png", Image.new("RGB", (20, 20), (30 * number, 99 * shard, 0))),
                    ("mask.png", Image.new("L", (20, 20), 255)),
                ):
                    file = io.BytesIO()
                    picture.save(file, "PNG")
                    files[suffix] = file.getvalue()
                if number == 3:
                    files["png"] = b"no picture"
                category = ("foreground", "background", None)[number % 3]
                files["json"] = json.dumps({"category": category} if category else {}).encode()
                for suffix, data in files.items():
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return tmp_path / "photos-{0..1}.tar"


def read_cache(folder):
    cache = LatentCacheDataset(folder)
    return [{name: value.clone() for name, value in cache[index].items()} for index in range(len(cache))]


@pytest.mark.parametrize("stream", [False, True])
def test_cache_of_shards_carries_categories_and_goes_on_after_an_interruption(
    categorised, tmp_path, tiny_vae, stream, monkeypatch
):
    def build(folder, **options):
        data = open_data(32, train_shards_path_or_url=[str(categorised)], stream_shards=stream, shuffle_buffer_size=3)
        build_latent_cache(tiny_vae, data, folder, 2, crops_per_picture=2, **options)

    build(tmp_path / "whole")
    whole = read_cache(tmp_path / "whole")
    assert len(whole) == 2 * 12 * 2
    categories = [int(sample["category"]) for sample in whole[::2]]
    assert categories == [1, 0, -1, 0, -1, 1] * 4

    encode, calls = tiny_vae.encode, []

    def interrupted(pixels):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(tiny_vae, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache").glob("latents-*"))
    with pytest.raises(ValueError, match="unfinished"):
        LatentCacheDataset(tmp_path / "cache")
    build(tmp_path / "cache")
    assert len(calls) < 11 + 24 - 3  # what was there was not encoded again
    again = read_cache(tmp_path / "cache")
    assert all(torch.equal(one[name], other[name]) for one, other in zip(whole, again) for name in one)

    for rank in range(2):
        build(tmp_path / "shared", process_index=rank, num_processes=2)
    shared = read_cache(tmp_path / "shared")
    assert all(torch.equal(one[name], other[name]) for one, other in zip(whole, shared) for name in one)
    batch = next(iter(TrainingBatches(LatentCacheDataset(tmp_path / "cache"), 6, 0)))
    assert batch["category"].dtype == torch.int64 and set(batch["category"].tolist()) <= {-1, 0, 1}


def test_hole_at_latent_size_covers_every_touched_cell():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 7:9, 15] = 1  # touches two cells, and neither at its first pixel's column
    assert hole_at_latent_size(mask, (4, 4)).nonzero()[:, 2:].tolist() == [[0, 1], [1, 1]]
    assert mask_to_latent_size(mask, (4, 4)).sum() == 0
