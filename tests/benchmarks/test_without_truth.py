import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffusers_moebius.pictures.mask import dilate_mask


@pytest.fixture(scope="module")
def without_truth(import_script):
    return import_script("without_truth")


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def test_measures(without_truth, lpips):
    photo, mask = noise(0), np.zeros((128, 128), bool)
    mask[40:90, 40:90] = True
    ring = dilate_mask(mask, 16) & ~mask
    blurred = np.where(mask[..., None], np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(8))), photo)
    for measure in ("strangeness", "seam"):
        function = without_truth.MEASURES[measure]
        assert function(lpips, photo, photo, mask, ring) < function(lpips, blurred, photo, mask, ring)
    # Nothing changes less than a photo in which the object stays.
    assert without_truth.change_of_ring(lpips, photo, photo, mask, ring) == 0
    assert without_truth.change_of_ring(lpips, blurred, photo, mask, ring) > 0
    # All steps of 10, those across the edge of 30.
    stairs = np.repeat((10 * np.arange(20))[None, :, None], 20, 0).repeat(3, 2)
    half = np.zeros((20, 20), bool)
    half[:, 10:] = True
    stairs[:, 10:] += 20
    ring = dilate_mask(half, 5) & ~half
    steps = without_truth.seam(lpips, stairs.astype(np.uint8), None, half, ring)
    assert steps == pytest.approx(np.log(30.5 / (0.5 + 10 * 20 * 4 / (20 * 4 + 19 * 5))), rel=1e-6)


def test_a_run_is_compared(without_truth, lpips, tmp_path):
    mask = np.zeros((128, 128), bool)
    mask[40:90, 40:90] = True
    pictures = []
    for number in range(3):
        photo = noise(number)
        grey = np.where(mask[..., None], np.uint8(128), photo)
        for name, picture in (("photo", photo), ("mask", mask), ("true", photo), ("grey", grey)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / name / f"{number}.png")
        scores = {"true": {"lpips_hole": 0.0}, "grey": {"lpips_hole": 1.0}}
        pictures.append({"name": str(number), "scores": scores})
    report = {"pictures": pictures, "means": {"all": {"scores": scores}}}
    lines = without_truth.compare(report, tmp_path, lpips, 16).splitlines()
    # Pairs, then the truth against itself, against grey and against the object.
    assert lines[3].startswith("| strangeness | 100% | 0% | 100% |")
    assert lines[2].endswith("| 0% |")  # the object changes the ring least


def test_bad_input_is_named(without_truth, tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        without_truth.main([str(tmp_path)])
    (tmp_path / "report.json").write_text(json.dumps({"settings": {"output": None}, "means": {"all": {"scores": {}}}}))
    with pytest.raises(ValueError, match="two methods"):
        without_truth.main([str(tmp_path)])
