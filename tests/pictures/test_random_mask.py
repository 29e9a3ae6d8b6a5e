import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_moebius.pictures.random_mask import MASK_PRESETS, MaskPreset, random_mask


@settings(max_examples=40, deadline=None)
@given(
    preset=st.sampled_from(sorted(MASK_PRESETS)),
    height=st.integers(8, 96),
    width=st.integers(8, 96),
    seed=st.integers(0, 2**32 - 1),
)
def test_mask_is_neither_empty_nor_full_and_follows_its_seed(preset, height, width, seed):
    mask = random_mask(height, width, preset, np.random.default_rng(seed))
    assert mask.shape == (height, width) and mask.dtype == bool
    assert 0 < mask.sum() < mask.size
    assert np.array_equal(mask, random_mask(height, width, preset, np.random.default_rng(seed)))


def test_masks_of_one_generator_differ():
    generator = np.random.default_rng(0)
    masks = [random_mask(64, 64, "medium_512", generator) for _ in range(8)]
    assert len({mask.tobytes() for mask in masks}) == 8


def test_coverage_does_not_depend_on_the_resolution():
    def mean_coverage(size):
        generator = np.random.default_rng(1)
        return np.mean([random_mask(size, size, "thick_256", generator).mean() for _ in range(150)])

    assert mean_coverage(64) == pytest.approx(mean_coverage(256), abs=0.05)


def test_thick_masks_cover_more_than_medium_ones():
    def mean_coverage(preset):
        generator = np.random.default_rng(2)
        return np.mean([random_mask(128, 128, preset, generator).mean() for _ in range(150)])

    assert mean_coverage("thick_512") > mean_coverage("medium_512") + 0.05


def test_thin_preset_has_no_boxes_and_boxes_keep_their_margin():
    boxes_only = MaskPreset(64, (0, 0), 0, 0, boxes=(1, 3), box_side=(10, 90), box_margin=8)
    generator = np.random.default_rng(3)
    for _ in range(20):
        mask = random_mask(64, 64, boxes_only, generator)
        # The dilation is up to 7 px twice, so a margin of 8 px leaves 2 px at least.
        assert not mask[:2].any() and not mask[-2:].any() and not mask[:, :2].any() and not mask[:, -2:].any()
    assert MASK_PRESETS["thin_512"].boxes is None


@pytest.mark.parametrize("arguments", [{"preset": "huge"}, {"height": 4}, {"width": 0}])
def test_bad_arguments_are_named(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"`{name}`"):
        random_mask(**({"height": 32, "width": 32} | arguments))
