import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from random_pictures import noise_image

from diffusers_moebius.pictures.mask import dilate_mask, fit_mask, grow_over_rims, load_masks, read_mask
from diffusers_moebius.pictures.picture import load_pictures


class TestDilateMask:
    @given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)), st.integers(0, 15))
    def test_equals_the_definition(self, mask, pixels):
        expected = np.zeros_like(mask)
        for row, column in np.argwhere(mask):
            expected[max(row - pixels, 0) : row + pixels + 1, max(column - pixels, 0) : column + pixels + 1] = True
        np.testing.assert_array_equal(dilate_mask(mask, pixels), expected)


class TestGrowOverRims:
    def photo(self, size=512):
        """Grass of a kind: rough, and lighter here than there."""
        generator = np.random.default_rng(0)
        light = Image.fromarray(generator.integers(60, 180, (9, 9), dtype=np.uint8)).resize((size, size))
        return np.asarray(light)[..., None] * np.array([0.6, 1, 0.4]) + generator.normal(0, 8, (size, size, 3))

    def hole(self, size=512):
        mask = np.zeros((size, size), bool)
        mask[3 * size // 8 : size // 2, size // 4 : 3 * size // 8] = True
        return mask

    def grow(self, mask, photo):
        return grow_over_rims(mask, Image.fromarray(photo.round().clip(0, 255).astype(np.uint8)))

    @pytest.mark.parametrize(
        "size, left, grown", [(512, 2, 2), (512, 5, 6), (512, 9, 8), (512, 30, 0), (1536, 11, 12), (128, 2, 2)]
    )
    def test_what_is_left_of_an_object_is_covered(self, size, left, grown):
        photo, mask = self.photo(size), self.hole(size)
        photo[dilate_mask(mask, left)] += [120, 0, 120]
        np.testing.assert_array_equal(self.grow(mask, photo), dilate_mask(mask, grown))

    def test_a_shadow_is_covered(self):
        photo, mask = self.photo(), self.hole()
        photo[dilate_mask(mask, 6)] *= 0.4
        np.testing.assert_array_equal(self.grow(mask, photo), dilate_mask(mask, 6))

    @pytest.mark.parametrize("size", [40, 128, 512, 1536])
    def test_a_hole_in_something_else_stays(self, size):
        mask = self.hole(size)
        for photo in (
            self.photo(size),
            np.full((size, size, 3), 120),
            np.random.default_rng(0).random((size,) * 2 + (3,)) * 255,
        ):
            np.testing.assert_array_equal(self.grow(mask, photo), mask)

    def test_only_the_stretch_where_something_is_left_grows(self):
        photo, mask = self.photo(), np.zeros((512, 512), bool)
        mask[200:216, 50:450] = True
        photo[194:200, 60:90] = 255
        grown = self.grow(mask, photo)
        assert grown[194:200, 60:90].all() and not (grown & ~mask)[:, 200:].any()

    def test_what_is_in_the_mask_is_not_looked_at(self):
        photo, mask = self.photo(), self.hole()
        mask[300:400, 300:420] = True
        photo[dilate_mask(mask, 4)] = 255
        expected = self.grow(mask, photo)
        photo[mask] = np.random.default_rng(1).integers(0, 256, (mask.sum(), 3))
        np.testing.assert_array_equal(self.grow(mask, photo), expected)
        assert (expected & ~mask).any()

    def test_masks_without_anything_around_them_stay(self):
        for mask in (np.zeros((64, 64), bool), np.ones((64, 64), bool), ~self.hole(64)):
            np.testing.assert_array_equal(self.grow(mask, self.photo(64)), mask)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
    def test_photos_of_every_kind(self, mode):
        photo, mask = self.photo(), self.hole()
        photo[dilate_mask(mask, 4)] = 255
        picture = Image.fromarray(photo.round().clip(0, 255).astype(np.uint8)).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        np.testing.assert_array_equal(grow_over_rims(mask, picture), dilate_mask(mask, 4))


class TestLoadMasks:
    drawn = np.zeros((24, 20), bool)
    drawn[5:15, 3:12] = True

    def read(self, value):
        return load_masks(value, load_pictures(noise_image("RGB")))[0]

    def test_every_form_of_a_mask(self):
        byte = self.drawn.astype(np.uint8) * 255
        grey = Image.fromarray(byte)
        values = [
            self.drawn,
            byte,
            byte[None],
            byte[..., None],
            self.drawn.astype(np.uint8),
            self.drawn.astype(np.uint16),
            torch.from_numpy(self.drawn).to(torch.uint8),
            Image.fromarray(self.drawn.astype(np.uint8)),
            self.drawn.astype(np.float64),
            self.drawn * np.float32(0.6) + np.float32(0.1),
            self.drawn.astype(np.uint16) * 65535,
            np.repeat(byte[..., None], 3, axis=2),
            torch.from_numpy(self.drawn),
            torch.from_numpy(byte),
            torch.from_numpy(byte)[None],
            torch.from_numpy(byte)[None, None],
            torch.from_numpy(self.drawn).bfloat16(),
            [grey],
            *(grey.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")),
            Image.fromarray(self.drawn.astype(np.uint16) * 65535),
            Image.fromarray(self.drawn.astype(np.float32)),
        ]
        for value in values:
            np.testing.assert_array_equal(self.read(value), self.drawn)

    @pytest.mark.parametrize("color", [0, 128, 255])
    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_alpha_is_the_mask_unless_it_is_opaque(self, mode, color):
        byte = self.drawn.astype(np.uint8) * 255
        image = Image.new(mode, (20, 24), color if mode == "LA" else (color, color, color))
        image.putalpha(Image.fromarray(byte))
        np.testing.assert_array_equal(self.read(image), self.drawn)
        np.testing.assert_array_equal(self.read(np.asarray(image)), self.drawn)
        image.putalpha(0)
        assert not self.read(image).any()
        image = Image.fromarray(byte).convert(mode)
        image.putalpha(255)
        np.testing.assert_array_equal(self.read(image), self.drawn)

    def test_threshold_is_half_of_white(self):
        assert self.read(np.full((24, 20), 128, np.uint8)).all()
        assert not self.read(np.full((24, 20), 127, np.uint8)).any()
        assert self.read(np.full((24, 20), 0.5)).all()

    @pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
    def test_grey_is_filled_from_half_of_white_on(self, mode, caplog):
        noise = noise_image(mode)
        values = np.asarray(noise.convert("L") if mode == "RGB" else noise, np.float64)
        mask = self.read(noise)
        assert "% of its pixels are neither dark nor bright" in caplog.text
        half = 32768 if mode == "I;16" else 128
        clear = np.abs(values - half) > 2  # the grey of colours is rounded
        np.testing.assert_array_equal(mask[clear], (values >= half)[clear])

    def test_soft_edges_are_not_worth_a_word(self, caplog):
        jpeg = io.BytesIO()
        Image.fromarray(self.drawn).convert("L").resize((160, 192), 0).save(jpeg, "JPEG", quality=70)
        mask = load_masks(Image.open(jpeg), load_pictures(noise_image("RGB", 192, 160)))[0]
        assert not caplog.text
        np.testing.assert_array_equal(mask, self.drawn.repeat(8, 0).repeat(8, 1))

    def test_a_mask_of_the_same_aspect_ratio_is_resized(self):
        half = self.drawn.reshape(12, 2, 10, 2).any(axis=(1, 3))
        np.testing.assert_array_equal(self.read(half), half.repeat(2, 0).repeat(2, 1))
        assert not (self.drawn & ~self.read(self.drawn.repeat(3, 0).repeat(3, 1))).any()

    def test_one_mask_for_several_pictures(self):
        pictures = load_pictures([noise_image("RGB"), noise_image("L")])
        assert len(load_masks(self.drawn, pictures)) == 2

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (np.zeros((20, 24), np.uint8), "24×20"),
            (Image.new("L", (21, 24)), "21×24"),
            (Image.new("L", (20, 25)), "20×25"),
            (np.zeros((20, 24), np.uint8), "EXIF orientation"),
            ([np.zeros((24, 20), bool)] * 3, "3 masks for 1 pictures"),
            (np.full((24, 20), np.nan), "NaN"),
            (np.full((24, 20), 2.0), "range 0 to 1"),
            (np.zeros((24, 20), np.int64), "int64"),
            (Image.new("L", (0, 0)), "empty"),
            ("mask.png", "of type str"),
        ],
    )
    def test_refuses(self, value, words):
        with pytest.raises(ValueError, match="`mask_image`") as error:
            self.read(value)
        assert words in str(error.value)


class TestReadMask:
    drawn = TestLoadMasks.drawn

    def glass(self, mode="RGBA"):
        """A picture with a hole, as some interfaces want their masks: transparent where it is to be filled."""
        image = noise_image(mode)
        image.putalpha(Image.fromarray(np.uint8(255) * ~self.drawn))
        return image

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_source(self, mode):
        glass = self.glass(mode)
        np.testing.assert_array_equal(read_mask(glass, source="transparent")[0], self.drawn)
        for source in ("auto", "alpha"):
            np.testing.assert_array_equal(read_mask(glass, source=source)[0], ~self.drawn)
        opaque = glass.convert(mode[:-1])
        np.testing.assert_array_equal(read_mask(glass, source="luminance")[0], read_mask(opaque)[0])

    @pytest.mark.parametrize("source", ["alpha", "transparent"])
    def test_source_that_is_not_there(self, source):
        with pytest.raises(ValueError, match=f"`mask_source` is '{source}', but `mask_image` has no alpha"):
            read_mask(self.drawn, source=source)

    def test_unknown_source(self):
        with pytest.raises(ValueError, match=r"`mask_source` must be one of 'auto', .* but is 'red'"):
            read_mask(self.drawn, source="red")

    def test_invert(self):
        np.testing.assert_array_equal(read_mask(~self.drawn, invert=True)[0], self.drawn)

    def test_threshold(self):
        values = np.linspace(0, 1, 480).reshape(24, 20)
        for threshold in (0.1, 0.9, 1):
            np.testing.assert_array_equal(read_mask(values, threshold)[0], values >= threshold)

    @pytest.mark.parametrize("threshold", [0, -0.1, 1.1, np.nan])
    def test_threshold_is_a_share(self, threshold):
        with pytest.raises(ValueError, match="`mask_threshold`"):
            read_mask(self.drawn, threshold)

    def test_what_may_not_be_meant_is_said(self):
        assert read_mask(self.drawn)[1] == []
        (remark,) = read_mask(~self.drawn)[1]
        assert remark.startswith("81% of the photo") and "invert" in remark
        assert read_mask(~self.drawn, invert=True)[1] == []
        ring = np.ones((24, 20), bool)
        ring[1:-1, 1:-1] = False
        (remark,) = read_mask(ring)[1]
        assert "whole border" in remark and "invert" in remark


class TestFitMask:
    def test_strokes_survive(self):
        mask = np.zeros((600, 400), bool)
        mask[77], mask[:, 123] = True, True
        small = fit_mask(mask, 60, 40)
        assert small.sum() == 60 + 40 - 1 and small[7].all() and small[:, 12].all()

    @pytest.mark.parametrize("size", [(683, 1024), (682, 1024), (67, 100), (3333, 5000)])
    def test_sizes_that_rounding_gives(self, size):
        assert fit_mask(np.zeros(size, bool), 2667, 4000).shape == (2667, 4000)

    def test_stretch(self):
        mask = np.zeros((2, 2), bool)
        mask[0, 0] = True
        expected = np.zeros((4, 10), bool)
        expected[:2, :5] = True
        np.testing.assert_array_equal(fit_mask(mask, 4, 10, stretch=True), expected)
        with pytest.raises(ValueError, match="2×2 px, but its `image` is 10×4"):
            fit_mask(mask, 4, 10)
