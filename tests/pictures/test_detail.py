"""Texture from the photo itself, on pictures whose continuation is known."""

import numpy as np
import pytest
import torch

from diffusers_moebius.pictures.detail import add_detail, held_out_errors, holes
from diffusers_moebius.pictures.paste import paste_fill
from diffusers_moebius.pictures.picture import Picture
from diffusers_moebius.pictures.region import Region, resize


def stripes(height=96, width=128):
    """A wall of stripes and dots that repeats every 12 px, `[H, W, 3]` in [0, 1]."""
    rows, columns = np.mgrid[:height, :width]
    wave = 0.5 + 0.3 * np.sin(2 * np.pi * columns / 12)
    dots = 0.2 * ((rows % 12 < 3) & (columns % 12 < 3))
    return np.stack([wave, wave - dots, 0.5 * wave + dots], axis=2).astype(np.float32)


def box_mask(shape, left, top, right, bottom):
    mask = np.zeros(shape[:2], bool)
    mask[top:bottom, left:right] = True
    return mask


def region(colors, mask, scale=1.0, box=None):
    height, width = mask.shape
    box = box or (0, 0, width, height)
    content = (round((box[3] - box[1]) / scale), round((box[2] - box[0]) / scale))
    return Region(Picture(colors, "RGB"), mask, box, content, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_texture_that_repeats_is_continued():
    photo, mask = stripes(), box_mask((96, 128), 50, 30, 80, 60)
    haze = np.full_like(photo, 0.5)
    result = add_detail(haze, region(photo, mask), generator=seeded())
    error, haze_error = (np.square(picture - photo)[mask].mean() for picture in (result, haze))
    assert error < 0.1 * haze_error
    np.testing.assert_array_equal(result[~mask], photo[~mask])


def test_a_texture_that_grows_darker_goes_on_doing_so_inside():
    """No two places have the same brightness, so that copied patches have to be corrected."""
    photo, mask = 0.5 * stripes(160, 160), box_mask((160, 160), 0, 50, 160, 110)
    photo += np.linspace(0, 0.5, 160, dtype=np.float32)[:, None, None]
    result = add_detail(np.full_like(photo, 0.5), region(photo, mask), generator=seeded())
    difference = torch.from_numpy((result - photo)[50:110]).permute(2, 0, 1)
    assert difference.square().mean() < 0.2 * photo[mask].var(0).mean()
    bands = torch.nn.functional.avg_pool2d(difference, 12).mean(2)  # over whole periods, by rows
    assert bands.abs().max() < 0.04  # 0.07 without correction


def test_the_seed_decides():
    random = np.random.default_rng(0)
    photo, mask = random.random((120, 140, 3), np.float32), box_mask((120, 140), 40, 40, 100, 90)
    first, same, other = (add_detail(photo, region(photo, mask), generator=seeded(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_what_was_in_the_hole_does_not_matter():
    photo, mask = stripes(), box_mask((96, 128), 50, 30, 80, 60)
    fill = np.full_like(photo, 0.5)
    changed = photo.copy()
    changed[mask] = [1, 0, 1]
    results = [add_detail(fill, region(colors, mask), generator=seeded()) for colors in (photo, changed)]
    np.testing.assert_array_equal(*results)


def test_a_model_that_is_wrong_about_what_is_known_leaves_no_trace_after_the_paste():
    photo, mask = stripes(), box_mask((96, 128), 50, 30, 80, 60)
    where = region(photo, mask)
    results = [add_detail(np.full_like(photo, value), where, generator=seeded()) for value in (0.2, 0.8)]
    pasted = [paste_fill(where.picture, fill, mask, where.box, "seamless").samples for fill in results]
    np.testing.assert_allclose(*pasted, atol=1e-6)


def test_nothing_is_copied_from_beside_the_hole():
    photo, mask = stripes(), box_mask((96, 128), 50, 30, 80, 60)
    rim = box_mask((96, 128), 46, 26, 84, 64) & ~mask
    photo[rim] = [1, 0, 0]
    result = add_detail(np.full_like(photo, 0.5), region(photo, mask), generator=seeded())
    inside = box_mask((96, 128), 60, 40, 70, 50)
    assert (result[inside] - [1, 0, 0] != 0).any(axis=1).all()
    assert result[inside][:, 0].mean() < 0.7


def test_the_box_may_be_smaller_than_the_surroundings():
    photo, mask = stripes(), box_mask((96, 128), 50, 30, 80, 60)
    box = (44, 20, 90, 70)
    fill = np.full((50, 46, 3), 0.5, np.float32)
    result = add_detail(fill, region(photo, mask, box=box), generator=seeded())
    part = mask[20:70, 44:90]
    assert np.square(result - photo[20:70, 44:90])[part].mean() < 0.01
    np.testing.assert_array_equal(result[~part], photo[20:70, 44:90][~part])


def test_what_was_enlarged_becomes_sharp():
    random = np.random.default_rng(0)
    photo, mask = random.random((192, 192, 3), np.float32), box_mask((192, 192), 60, 60, 130, 130)
    tensor = torch.from_numpy(photo).permute(2, 0, 1)[None]
    blurred = resize(resize(tensor, 48, 48), 192, 192)[0].permute(1, 2, 0).numpy()
    result = add_detail(blurred, region(photo, mask, scale=4), "enlarged", seeded())

    def energy(picture, where):
        return np.square(np.diff(picture, axis=1))[where[:, 1:]].mean()

    assert energy(blurred, mask) < 0.1 * energy(photo, ~mask)
    assert energy(result, mask) > 0.5 * energy(photo, ~mask)
    # Its low frequencies stay those of the filling.
    low = [resize(torch.from_numpy(p).permute(2, 0, 1)[None], 24, 24)[0, :, 8:16, 8:16] for p in (result, blurred)]
    assert (low[0] - low[1]).abs().mean() < 0.05


def test_a_glow_whose_colours_stand_nowhere_else_stays_smooth():
    """Grass of every brightness lies around it, but a place that is smooth when reduced gets none of it."""
    rows, columns = np.mgrid[:192, :192]
    glow = 0.5 * np.exp(-((rows - 96) ** 2 + (columns - 96) ** 2) / (2 * 50**2))
    grass = np.random.default_rng(0).normal(0, 0.1, glow.shape) * (np.abs(rows - 96) > 60)
    photo = np.stack([0.25 + glow, 0.25 + glow, 0.2 + glow / 2], 2) + grass[..., None]
    photo = photo.clip(0, 1).astype(np.float32)
    mask = box_mask((192, 192), 50, 50, 142, 142)
    tensor = torch.from_numpy(photo).permute(2, 0, 1)[None]
    blurred = resize(resize(tensor, 48, 48), 192, 192)[0].permute(1, 2, 0).numpy()
    result = add_detail(blurred, region(photo, mask, scale=4), "enlarged", seeded())
    energies = [np.square(np.diff(picture, axis=1))[mask[:, 1:]].mean() for picture in (result, photo)]
    assert energies[0] < 1.15 * energies[1]


@pytest.mark.parametrize(("detail", "scale"), [(None, 4), ("enlarged", 1), ("enlarged", 0.5)])
def test_without_need_the_filling_stays(detail, scale):
    photo, mask = stripes(), box_mask((96, 128), 50, 30, 80, 60)
    fill = np.random.default_rng(0).random(photo.shape, np.float32)
    np.testing.assert_array_equal(add_detail(fill, region(photo, mask, scale), detail, seeded()), fill)


@pytest.mark.parametrize("full", [False, True])
def test_masks_that_leave_nothing_to_do_or_to_copy(full):
    photo = stripes()
    np.testing.assert_array_equal(
        add_detail(photo, region(photo, np.full((96, 128), full)), generator=seeded()), photo
    )


@pytest.mark.parametrize("box", [(0, 0, 128, 90), (0, 0, 127, 96), (3, 3, 125, 93), (64, 0, 65, 96)])
def test_holes_that_leave_little_and_thin_ones(box):
    photo, mask = stripes(), box_mask((96, 128), *box)
    result = add_detail(np.full_like(photo, 0.5), region(photo, mask), generator=seeded())
    assert np.isfinite(result).all()
    assert 0 <= result.min() <= result.max() <= 1


def test_wrong_modes_are_refused():
    photo, mask = stripes(), box_mask((96, 128), 50, 30, 80, 60)
    with pytest.raises(ValueError, match=r"`detail`.*'Patches'"):
        add_detail(photo, region(photo, mask), "Patches")


def test_holes_are_told_apart_by_their_distance():
    boxes = [(0, 0, 10, 10), (14, 4, 20, 30), (90, 60, 95, 70)]
    parts = [box_mask((96, 128), *box) for box in boxes]
    mask = np.any(parts, axis=0)
    (near, other), (far, last) = holes(mask, 8)
    assert (near, far) == ((0, 0, 20, 30), boxes[2])
    np.testing.assert_array_equal(other, (parts[0] | parts[1])[:30, :20])
    assert last.all()
    assert len(holes(mask, 64)) == 1


def test_the_ring_around_a_hole_tells_whether_patches_know_what_comes():
    hole = torch.from_numpy(box_mask((96, 128), 50, 30, 80, 60))
    repeats = torch.from_numpy(stripes()).permute(2, 0, 1).contiguous()
    noise = torch.rand(3, 96, 128, generator=seeded())
    patches, smooth = held_out_errors(repeats, hole, ~hole, seeded())
    assert patches < 0.2 * smooth
    patches, smooth = held_out_errors(noise, hole, ~hole, seeded())
    assert patches > smooth


def test_where_nothing_fits_the_filling_stays():
    """Half of a face is never copied onto another thing: each block here stands once."""
    blocks = np.random.default_rng(0).random((4, 5, 3), np.float32)
    photo = blocks.repeat(32, 0).repeat(32, 1)
    mask = box_mask(photo.shape[:2], 50, 40, 100, 90)
    fill = photo.copy()
    fill[mask] = 0.5
    matched = paste_fill(Picture(photo, "RGB"), fill, mask, (0, 0, 160, 128), "seamless").samples
    kept = paste_fill(
        Picture(photo, "RGB"), add_detail(fill, region(photo, mask), generator=seeded()), mask, (0, 0, 160, 128), None
    ).samples
    np.testing.assert_allclose(kept, matched, atol=1e-5)
