import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_pictures import masks, pictures

from diffusers_moebius.pictures.mask import dilate_mask
from diffusers_moebius.pictures.paste import blur_mask, compensate_color, feather_inwards, match_edges, paste_fill
from diffusers_moebius.pictures.picture import Picture
from diffusers_moebius.pictures.region import (
    crop_region,
)


class TestFeather:
    @given(masks(1, 120))
    def test_is_zero_exactly_outside(self, mask):
        weight = feather_inwards(mask)
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight > 0, mask)
        assert weight.max() == 1

    def test_thin_holes_have_no_ramp(self):
        mask = np.zeros((60, 200), bool)
        mask[20:36, 10:190] = True  # 16 px
        np.testing.assert_array_equal(feather_inwards(mask), mask.astype(np.float32))

    @pytest.mark.parametrize(("thickness", "width"), [(17, 1), (40, 2), (80, 4), (130, 8), (300, 16), (600, 16)])
    def test_ramp_grows_with_the_hole(self, thickness, width):
        mask = np.zeros((thickness + 20, thickness + 30), bool)
        mask[10:-10, 15:-15] = True
        row = feather_inwards(mask)[mask.shape[0] // 2]
        ramp = row[15 : 15 + width + 1]
        np.testing.assert_allclose(ramp, np.arange(1, width + 2) / (width + 1), rtol=1e-6)
        np.testing.assert_array_equal(row, row[::-1])
        assert (row[15 + width : -15 - width] == 1).all()

    def test_no_ramp_at_the_borders_of_the_picture(self):
        mask = np.zeros((200, 100), bool)
        mask[:150] = True
        weight = feather_inwards(mask)
        assert (weight[:130] == 1).all()  # left, right and upper border
        assert (weight[149] < 0.5).all()
        assert (feather_inwards(np.ones((50, 70), bool)) == 1).all()

    def test_ramp_follows_the_local_thickness(self):
        mask = np.zeros((200, 400), bool)
        mask[20:180, 20:180] = True
        mask[95:105, 180:380] = True  # a thin arm
        weight = feather_inwards(mask)
        assert weight[100, 20] < 0.2
        assert (weight[95:105, 200:380] == 1).all()

    def test_empty_mask(self):
        assert not feather_inwards(np.zeros((5, 6), bool)).any()


class TestMatchEdges:
    @given(masks(3, 60), st.integers(0, 9))
    def test_only_the_pixels_around_the_hole_count(self, mask, seed):
        fill, original, other = np.random.default_rng(seed).random((3, *mask.shape, 3), np.float32)
        result = match_edges(fill, original, mask)
        np.testing.assert_array_equal(result[~mask], fill[~mask])
        edge = dilate_mask(mask, 1) & ~mask
        if not edge.any():
            np.testing.assert_array_equal(result, fill)
            return
        other[edge] = original[edge]
        np.testing.assert_array_equal(match_edges(fill, other, mask), result)
        # A membrane has its extremes on its edge.
        shift, fixed = (result - fill)[mask], (original - fill)[edge]
        assert (shift >= fixed.min(0) - 1e-5).all() and (shift <= fixed.max(0) + 1e-5).all()

    @given(masks(3, 60), st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3))
    def test_a_shift_of_the_whole_picture_is_taken_back(self, mask, shift):
        original = np.random.default_rng(0).random((*mask.shape, 3), np.float32)
        if mask.all():
            return
        result = match_edges(original + np.float32(shift), original, mask)
        np.testing.assert_allclose(result[mask], original[mask], atol=1e-5)

    @pytest.mark.parametrize("box", [(10, 10, 50, 60), (0, 15, 45, 64), (0, 0, 64, 50), (30, 1, 31, 63)])
    def test_is_close_to_the_solution_of_laplaces_equation(self, box):
        top, left, bottom, right = box
        mask = np.zeros((64, 64), bool)
        mask[top:bottom, left:right] = True
        mask[20:35, 25:30] = False  # an island
        rows, columns = np.mgrid[:64, :64] / 64
        original = np.stack([np.sin(5 * rows + 3), columns**2 - rows, np.cos(9 * columns) * rows], -1)
        exact = original
        for _ in range(8000):
            padded = np.pad(exact, ((1, 1), (1, 1), (0, 0)), mode="edge")
            mean = (padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]) / 4
            exact = np.where(mask[..., None], mean, original)
        result = match_edges(np.zeros_like(original, np.float32), original, mask)
        error = np.abs(result - exact)[mask]
        assert error.mean() < 0.08 and error.max() < 0.4  # of a range of 2
        joined = np.where(mask[..., None], result, original)
        assert np.abs(np.diff(joined, axis=0)).max() < 0.2 and np.abs(np.diff(joined, axis=1)).max() < 0.2  # no seam

    def test_float64_and_what_lies_in_the_hole(self):
        mask = np.zeros((40, 50), bool)
        mask[5:30, 10:50] = True
        fill, original = np.random.default_rng(0).random((2, 40, 50, 3))
        result = match_edges(fill, original, mask)
        original[mask] = np.nan
        np.testing.assert_array_equal(match_edges(fill, original, mask), result)
        np.testing.assert_array_equal(match_edges(fill, original, np.ones_like(mask)), fill)


class TestPaste:
    @given(pictures(), st.integers(0, 20), st.sampled_from(["exact", "seamless", "blur", None]), st.booleans())
    def test_outside_is_untouched(self, case, margin, paste, color_compensation):
        picture, mask = case
        before = picture.samples.copy()
        box = crop_region(mask, margin, 16)
        left, top, right, bottom = box
        fill = np.random.default_rng(1).random((bottom - top, right - left, 3), np.float32)
        result = paste_fill(picture, fill, mask, box, paste, color_compensation)
        np.testing.assert_array_equal(picture.samples, before)
        assert result.samples.dtype == before.dtype and result.samples.shape == before.shape
        assert result.alpha is picture.alpha
        outside = {"blur": blur_mask(mask) == 0, None: np.zeros_like(mask)}.get(paste, ~mask).copy()
        beyond = np.ones_like(mask)
        beyond[top:bottom, left:right] = False
        outside |= beyond
        np.testing.assert_array_equal(result.samples[outside], before[outside])
        assert result.samples.min() >= 0 and result.samples.max() <= picture.peak

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_inside_is_the_fill(self, dtype):
        peak = np.iinfo(dtype).max
        picture = Picture(np.zeros((100, 80, 3), dtype), "RGB")
        mask = np.zeros((100, 80), bool)
        mask[10:90, 10:70] = True
        fill = np.random.default_rng(0).random((100, 80, 3), np.float32)
        result = paste_fill(picture, fill, mask, (0, 0, 80, 100)).samples
        core = feather_inwards(mask) == 1
        np.testing.assert_allclose(result[core] / peak, fill[core], atol=0.51 / peak)
        seamless = paste_fill(picture, fill, mask, (0, 0, 80, 100), "seamless").samples
        shifted = match_edges(fill, picture.rgb(), mask).clip(0, 1)
        np.testing.assert_allclose(seamless[mask] / peak, shifted[mask], atol=0.51 / peak)
        raw = paste_fill(picture, fill, mask, (0, 0, 80, 100), paste=None).samples
        np.testing.assert_allclose(raw / peak, fill, atol=0.51 / peak)

    def test_grey_and_cmyk_take_the_colour(self):
        mask = np.ones((20, 20), bool)
        fill = np.empty((20, 20, 3), np.float32)
        fill[:] = (1.0, 0.5, 0.0)
        grey = paste_fill(Picture(np.zeros((20, 20, 1), np.uint8), "L"), fill, mask, (0, 0, 20, 20))
        assert (grey.samples == round(255 * (0.299 + 0.5 * 0.587))).all()
        cmyk = paste_fill(Picture(np.zeros((20, 20, 4), np.uint8), "CMYK"), fill, mask, (0, 0, 20, 20))
        assert cmyk.samples[0, 0].tolist() == [0, 128, 255, 0]
        np.testing.assert_allclose(cmyk.rgb()[0, 0], (1, 0.5, 0), atol=0.01)

    def test_compensation_moves_the_mean_by_its_gain(self):
        random = np.random.default_rng(0)
        original = random.random((60, 60, 3))
        mask = np.zeros((60, 60), bool)
        mask[20:40, 25:45] = True
        fill = original + np.array([0.1, -0.05, 0.02])
        compensated = compensate_color(fill, original, mask)
        np.testing.assert_allclose(compensated - fill, np.broadcast_to([-0.11, 0.055, -0.022], fill.shape), atol=1e-12)
        # Only a ring of 5 px around the mask's box counts.
        far = fill.copy()
        far[:14] += 1
        np.testing.assert_allclose(compensate_color(far, original, mask)[30, 30], compensated[30, 30])
        assert compensate_color(fill, original, np.ones_like(mask)) is fill
