import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_pictures import masks, sizes

from diffusers_moebius.pictures.mask import mask_box
from diffusers_moebius.pictures.region import (
    MAX_ASPECT_RATIO,
    crop_region,
    fill_hole,
    pad_to_multiple,
    resize,
    resize_mask,
    working_size,
)


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
