import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_moebius.training.crops import Cropper, crop_mask, picture_to_tensor, random_box
from diffusers_moebius.training.data import PictureDataset
from diffusers_moebius.training.picture_sources import list_pictures

PRESETS = ["medium_512", "thick_256"]


def one_picture(folder, picture, **options):
    folder.mkdir()
    picture.save(folder / "picture.png")
    return PictureDataset(list_pictures([folder]), Cropper(16, PRESETS, **options))


def test_crop_is_square_and_inside_the_picture(tmp_path):
    data = one_picture(tmp_path / "photos", Image.new("RGB", (60, 30), (10, 200, 30)), crop_scale=(0.2, 1.0))
    for epoch in range(20):
        crop = data[epoch]["pixel_values"]
        assert crop.shape == (3, 16, 16)
        assert (crop == crop[:, :1, :1]).all()  # nothing from beyond the border


def test_half_of_the_crops_are_mirrored_unless_none_is_to_be(tmp_path):
    picture = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 3)))
    for name, flip, least, most in (("both", True, 15, 45), ("one", False, 60, 60)):
        data = one_picture(tmp_path / name, picture, random_flip=flip)
        rising = sum(int(row[-1] > row[0]) for row in (data[epoch]["pixel_values"][0, 8] for epoch in range(60)))
        assert least <= rising <= most


def test_crops_are_of_the_size_that_is_asked_for(tmp_path):
    stripes = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    data = one_picture(tmp_path / "photos", stripes, crop_scale=(1 / 16, 1 / 16))
    for epoch in range(10):
        row = data[epoch]["pixel_values"][0, 0] * 127.5
        assert (row[0] - row[-1]).abs() == 15  # a quarter of the side, pixel for pixel


def test_samples_depend_on_seed_epoch_and_index_alone(photo_dir):
    dataset = PictureDataset(list_pictures([photo_dir]), Cropper(32, PRESETS, seed=5))
    again = PictureDataset(list_pictures([photo_dir]), Cropper(32, PRESETS, seed=5))
    first, same = dataset[2], again[2]
    assert torch.equal(first["pixel_values"], same["pixel_values"]) and torch.equal(first["mask"], same["mask"])
    next_epoch = dataset[2 + len(dataset)]
    assert not torch.equal(first["mask"], next_epoch["mask"])
    assert first["pixel_values"].shape == (3, 32, 32) and first["mask"].shape == (1, 32, 32)
    assert first["pixel_values"].min() >= -1 and first["pixel_values"].max() <= 1
    assert set(first["mask"].unique().tolist()) == {0.0, 1.0}


def test_another_picture_takes_the_place_of_an_unreadable_one(photo_dir):
    data = PictureDataset(list_pictures([photo_dir]), Cropper(16, PRESETS))
    broken = next(i for i, record in enumerate(data.records) if record.name.endswith("03-broken.jpg"))
    samples = [data[broken + epoch * len(data)] for epoch in range(12)]
    assert all(sample["skipped"][0].endswith("03-broken.jpg") for sample in samples)
    assert len({sample["pixel_values"].numpy().tobytes() for sample in samples}) > 6  # and not always the next
    assert torch.equal(data[broken]["pixel_values"], samples[0]["pixel_values"])


@settings(deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_crop_of_a_mask_is_inside_and_never_empty(data, seed):
    width, height = data.draw(st.integers(8, 90)), data.draw(st.integers(8, 90))
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    mask = np.zeros((height, width), bool)
    mask[y, x] = True  # the hardest object: one pixel
    left, top, side = random_box((width, height), np.random.default_rng(seed), mask=mask)
    assert 0 <= left <= x < left + side <= width and 0 <= top <= y < top + side <= height
    resolution = data.draw(st.sampled_from([8, 16, 64, 128]))
    for flip in (False, True):
        crop = crop_mask(mask, (left, top, side), resolution, flip)
        assert crop.shape == (resolution, resolution) and crop.any()
        columns = np.nonzero(crop)[1]
        # The mark is where the pixel is, to a pixel of the coarser of the two.
        middle = (x - left + 0.5) / side
        assert np.all(
            np.abs((columns + 0.5) / resolution - (1 - middle if flip else middle)) <= 1 / min(side, resolution)
        )


@settings(deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), seed=st.integers(0, 1000))
def test_random_box_is_inside(width, height, seed):
    left, top, side = random_box((width, height), np.random.default_rng(seed))
    assert 0 <= left <= left + side <= width and 0 <= top <= top + side <= height and side >= 1


def test_picture_to_tensor_spans_minus_one_to_one():
    picture = Image.fromarray(np.array([[[0, 255, 0], [255, 0, 255]]], dtype=np.uint8))
    assert picture_to_tensor(picture).tolist() == [[[-1, 1]], [[1, -1]], [[-1, 1]]]
