import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from diffusers_moebius.image_processing import (
    MAX_ASPECT_RATIO,
    Picture,
    blur_mask,
    compensate_color,
    crop_region,
    dilate_mask,
    feather_inwards,
    fill_hole,
    load_masks,
    load_pictures,
    mask_box,
    match_edges,
    pad_to_multiple,
    paste_fill,
    resize,
    resize_mask,
    working_size,
)


def sizes(low=1, high=70):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def masks(draw, low=1, high=70):
    """Masks of a few boxes, which often touch the borders; never empty."""
    height, width = draw(sizes(low, high))
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
        mask[top:bottom, left:right] = True
    return mask


def noise_image(mode, height=24, width=20, seed=0):
    """A Pillow picture of random samples in any mode that the package accepts."""
    random = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width)).astype(np.uint16))
    if mode == "I;16B":
        values = random.integers(0, 65536, (height, width)).astype(">u2")
        return Image.frombytes("I;16B", (width, height), values.tobytes())
    if mode == "I":
        return Image.fromarray(random.integers(0, 65536, (height, width)).astype(np.int32))
    if mode == "F":
        return Image.fromarray(random.random((height, width), np.float32))
    channels = len(Image.new(mode, (1, 1)).getbands())
    if mode == "1":
        return Image.fromarray(random.integers(0, 2, (height, width)).astype(bool))
    data = random.integers(0, 256, (height, width, channels)).astype(np.uint8)
    image = Image.frombytes(mode, (width, height), data.tobytes())
    if mode in ("P", "PA"):
        image.putpalette(random.integers(0, 256, 768).astype(np.uint8).tobytes())
    return image


class TestDilateMask:
    @given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)), st.integers(0, 15))
    def test_equals_the_definition(self, mask, pixels):
        expected = np.zeros_like(mask)
        for row, column in np.argwhere(mask):
            expected[max(row - pixels, 0) : row + pixels + 1, max(column - pixels, 0) : column + pixels + 1] = True
        np.testing.assert_array_equal(dilate_mask(mask, pixels), expected)


class TestRegions:
    @given(masks(), st.integers(0, 40))
    def test_box_is_the_smallest_and_grows_by_the_margin(self, mask, margin):
        left, top, right, bottom = mask_box(mask)
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert mask[top, left:right].any() and mask[bottom - 1, left:right].any()
        assert mask[top:bottom, left].any() and mask[top:bottom, right - 1].any()
        height, width = mask.shape
        grown = (max(left - margin, 0), max(top - margin, 0), min(right + margin, width), min(bottom + margin, height))
        assert mask_box(mask, margin) == grown

    @given(masks(16, 400), st.integers(0, 40))
    def test_crop_region_holds_the_grown_box_within_its_limits(self, mask, margin):
        left, top, right, bottom = crop_region(mask, margin, 16)
        box = mask_box(mask, margin)
        height, width = mask.shape
        assert 0 <= left <= box[0] and 0 <= top <= box[1] and box[2] <= right <= width and box[3] <= bottom <= height
        assert right - left >= 16 and bottom - top >= 16
        long, short = max(right - left, bottom - top), min(right - left, bottom - top)
        assert long <= MAX_ASPECT_RATIO * short or short == min(height, width)

    def test_crop_region_is_exactly_the_grown_box_where_that_is_usable(self):
        mask = np.zeros((300, 400), bool)
        mask[100:150, 200:280] = True
        assert crop_region(mask, 0, 16) == (200, 100, 280, 150)
        assert crop_region(mask, 64, 16) == (136, 36, 344, 214)

    @pytest.mark.parametrize(
        ("height", "width", "expected"),
        [
            (512, 512, (512, 512)),
            (500, 640, (500, 640)),
            (256, 700, (256, 700)),
            (640, 800, (640, 800)),
            (641, 801, (512, 640)),
            (3000, 4000, (512, 683)),
            (4000, 3000, (683, 512)),
            (200, 100, (512, 256)),
            (64, 64, (512, 512)),
            (200, 900, (200, 900)),
        ],
    )
    def test_working_size(self, height, width, expected):
        assert working_size(height, width, 512) == expected

    def test_working_size_with_targets(self):
        assert working_size(300, 400, 512, 256, 320) == (256, 320)
        assert working_size(300, 400, 512, target_height=600) == (600, 800)
        assert working_size(300, 400, 512, target_width=200) == (150, 200)

    @given(st.integers(16, 5000), st.integers(16, 5000))
    def test_working_size_keeps_the_aspect_ratio(self, height, width):
        working_height, working_width = working_size(height, width, 512)
        scale_height, scale_width = working_height / height, working_width / width
        assert abs(working_height - height * scale_width) <= 0.5 + scale_height + 0.5 * height / width
        assert abs(working_width - width * scale_height) <= 0.5 + scale_width + 0.5 * width / height


class TestResizing:
    @given(sizes(1, 40), st.sampled_from([8, 32]))
    def test_padding_continues_the_picture(self, size, multiple):
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        padded = pad_to_multiple(image, multiple)
        assert padded.shape[2] % multiple == 0 and padded.shape[3] % multiple == 0
        assert padded.shape[2] - size[0] < multiple and padded.shape[3] - size[1] < multiple
        torch.testing.assert_close(padded[..., : size[0], : size[1]], image, rtol=0, atol=0)
        assert set(padded.flatten().tolist()) == set(image.flatten().tolist())

    def test_padding_reflects(self):
        padded = pad_to_multiple(torch.arange(3.0).reshape(1, 1, 1, 3), 5)
        assert padded[0, 0, 0].tolist() == [0, 1, 2, 1, 0]
        assert padded.shape == (1, 1, 5, 5)

    @given(sizes(4, 40), sizes(4, 40))
    def test_resizing_keeps_flat_colours_and_the_range(self, size, new_size):
        flat = torch.full((1, 3, *size), 0.25)
        torch.testing.assert_close(resize(flat, *new_size), torch.full((1, 3, *new_size), 0.25))
        steps = (torch.arange(size[0] * size[1]).reshape(1, 1, *size) % 2).float()
        resized = resize(steps, *new_size)
        assert resized.shape[-2:] == new_size and resized.min() >= 0 and resized.max() <= 1

    def test_same_size_is_the_same_tensor(self):
        image = torch.rand(1, 3, 9, 7)
        assert resize(image, 9, 7) is image

    @given(masks(2, 60), sizes(1, 60))
    def test_mask_loses_no_pixel(self, mask, new_size):
        tensor = torch.from_numpy(mask)[None, None].float()
        resized = resize_mask(tensor, *new_size)
        assert resized.shape[-2:] == new_size and set(resized.unique().tolist()) <= {0.0, 1.0}
        for row, column in np.argwhere(mask):
            new_row = math.floor((row + 0.5) * new_size[0] / mask.shape[0])
            new_column = math.floor((column + 0.5) * new_size[1] / mask.shape[1])
            assert resized[0, 0, new_row, new_column] == 1
        torch.testing.assert_close(resize_mask(tensor, *mask.shape), tensor)


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


@st.composite
def pictures(draw):
    mask = draw(masks(16, 60))
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]))
    color = draw(st.sampled_from(["L", "RGB", "CMYK"]))
    shape = (*mask.shape, {"L": 1, "RGB": 3, "CMYK": 4}[color])
    random = np.random.default_rng(draw(st.integers(0, 9)))
    samples = random.random(shape)
    if np.issubdtype(dtype, np.integer):
        samples = np.rint(samples * np.iinfo(dtype).max)
    alpha = samples[..., :1].astype(dtype) if draw(st.booleans()) and color != "CMYK" else None
    return Picture(samples.astype(dtype), color, alpha), mask


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


MODES = {
    "1": "L",
    "L": "L",
    "LA": "LA",
    "P": "RGB",
    "PA": "RGBA",
    "RGB": "RGB",
    "RGBA": "RGBA",
    "CMYK": "CMYK",
    "I;16": "I;16",
    "I;16B": "I;16",
    "I": "I",
    "F": "F",
}


class TestLoadPictures:
    @pytest.mark.parametrize(("mode", "returned"), MODES.items())
    def test_modes_come_back(self, mode, returned):
        image = noise_image(mode)
        image.info["icc_profile"] = b"profile"
        (picture,) = load_pictures(image)
        result = picture.render("pil")
        assert result.mode == returned and result.size == image.size
        assert result.info["icc_profile"] == b"profile"
        expected = np.asarray(image if mode.startswith(("I", "F")) else image.convert(returned))
        np.testing.assert_array_equal(np.asarray(result), expected)
        array = picture.render("np")
        assert array.shape[:2] == (24, 20) and array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1
        np.testing.assert_array_equal(picture.render("pt").permute(1, 2, 0).numpy(), array)

    @pytest.mark.parametrize("mode", ["P", "RGB", "L"])
    def test_transparent_colour_becomes_alpha(self, mode):
        image = noise_image(mode)
        key = image.getpixel((3, 4))
        image.info["transparency"] = key
        (picture,) = load_pictures(image)
        assert picture.alpha is not None and picture.alpha[4, 3, 0] == 0 and picture.alpha.max() == 255
        assert picture.render("pil").mode == ("LA" if mode == "L" else "RGBA")

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
    def test_rgb_agrees_with_pillow(self, mode):
        image = noise_image(mode)
        rgb = load_pictures(image)[0].rgb((2, 3, 10, 20))
        np.testing.assert_allclose(rgb * 255, np.asarray(image.convert("RGB"))[3:20, 2:10], atol=1.01)

    def test_arrays_and_tensors_of_one_picture_agree(self):
        image = noise_image("RGBA")
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        batches = [image, array, array[None], tensor, tensor[None], [array], [tensor], (image,)]
        for value in batches:
            pictures = load_pictures(value)
            assert len(pictures) == 1
            np.testing.assert_array_equal(pictures[0].samples, array[..., :3])
            np.testing.assert_array_equal(pictures[0].alpha, array[..., 3:])
        for value in (array / np.float32(255), tensor.float() / 255):
            np.testing.assert_allclose(load_pictures(value)[0].samples * 255, array[..., :3], atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_float_types_come_back(self, dtype):
        tensor = torch.rand(3, 20, 18).to(dtype)
        result = load_pictures(tensor)[0].render("pt")
        assert result.dtype == dtype and torch.equal(result, tensor)

    def test_integers_come_back_as_exact_floats(self):
        values = np.arange(256, dtype=np.uint8).reshape(16, 16)
        np.testing.assert_array_equal(np.rint(load_pictures(values)[0].render("np")[..., 0] * 255), values)
        deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        np.testing.assert_array_equal(np.rint(load_pictures(deep)[0].render("np")[..., 0] * 65535), deep)

    def test_sixteen_bit_colour_is_rounded_for_pillow(self):
        deep = np.full((16, 16, 3), 32896, np.uint16)  # 128 / 255
        assert load_pictures(deep)[0].render("pil").getpixel((0, 0)) == (128, 128, 128)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("photo.png", "of type str"),
            (None, "of type NoneType"),
            ([], "empty"),
            ([np.zeros((2, 16, 16, 3), np.uint8)], "batch inside"),
            (np.zeros((0, 16, 3), np.uint8), "empty"),
            (np.zeros((0, 16, 16, 3), np.uint8), "empty"),
            (torch.zeros(3, 0, 5), "empty"),
            (Image.new("RGB", (0, 7)), "empty"),
            (np.zeros((16,), np.uint8), "1 dimensions"),
            (np.zeros((1, 1, 16, 16, 3), np.uint8), "5 dimensions"),
            (np.zeros((16, 16, 5), np.uint8), "one to four channels"),
            (torch.zeros(16, 16, 3), "one to four channels"),
            (np.full((16, 16, 3), np.nan, np.float32), "NaN"),
            (np.full((16, 16, 3), np.inf), "NaN or infinite"),
            (np.full((16, 16, 3), -0.5), "from -0.5"),
            (torch.full((3, 16, 16), 1.5), "to 1.5"),
            (np.zeros((16, 16, 3), np.int64), "int64"),
            (np.zeros((16, 16, 3), bool), "bool"),
            (Image.new("HSV", (16, 16)), '"HSV"'),
            (Image.new("I", (16, 16), 70000), "70000"),
            (Image.new("F", (16, 16), 2.0), "range 0 to 1"),
        ],
    )
    def test_refuses(self, value, words):
        with pytest.raises(ValueError, match="`image`") as error:
            load_pictures(value)
        assert words in str(error.value)

    def test_refuses_a_truncated_file(self, tmp_path):
        path = tmp_path / "photo.jpg"
        noise_image("RGB", 200, 200).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ValueError, match="`image` cannot be read"):
            load_pictures(Image.open(path))


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


@pytest.mark.parametrize("size", [(1, 1), (37, 64), (65, 130)])
def test_fill_hole_keeps_what_is_known_and_continues_it(size):
    height, width = size
    x = torch.linspace(-1, 1, width).expand(1, 3, height, width)
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4 : height // 2, width // 4 : width // 2] = 1
    filled = fill_hole(torch.where(mask > 0, torch.full_like(x, 9.0), x), mask)
    assert torch.equal(torch.where(mask > 0, x, filled), x)
    assert (filled - x).abs().max() < 0.25  # a ramp goes on as one
    flat = fill_hole(torch.where(mask > 0, torch.full_like(x, 9.0), torch.full_like(x, 0.3)), mask)
    assert torch.allclose(flat, torch.full_like(x, 0.3), atol=1e-5)
    assert torch.equal(fill_hole(x, torch.ones_like(mask)), torch.zeros_like(x))  # nothing is known
