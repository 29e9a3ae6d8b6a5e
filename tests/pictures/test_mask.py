import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from random_pictures import noise_image

from diffusers_moebius.pictures.mask import dilate_mask, load_masks
from diffusers_moebius.pictures.picture import load_pictures


class TestDilateMask:
    @given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)), st.integers(0, 15))
    def test_equals_the_definition(self, mask, pixels):
        expected = np.zeros_like(mask)
        for row, column in np.argwhere(mask):
            expected[max(row - pixels, 0) : row + pixels + 1, max(column - pixels, 0) : column + pixels + 1] = True
        np.testing.assert_array_equal(dilate_mask(mask, pixels), expected)


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

    def test_one_mask_for_several_pictures(self):
        pictures = load_pictures([noise_image("RGB"), noise_image("L")])
        assert len(load_masks(self.drawn, pictures)) == 2

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (np.zeros((20, 24), np.uint8), "24×20"),
            (Image.new("L", (21, 24)), "21×24"),
            ([np.zeros((24, 20), bool)] * 3, "3 masks for 1 pictures"),
            (np.arange(480, dtype=np.uint16).reshape(24, 20), "more than two values"),
            (np.linspace(0, 1, 480).reshape(24, 20), "more than two values"),
            (noise_image("L"), "more than two values"),
            (noise_image("RGBA"), "more than two values"),
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
