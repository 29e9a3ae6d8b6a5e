import importlib.util
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_moebius.training.perceptual import LPIPS, distance_map

pytest.importorskip("cv2")
pytest.importorskip("skimage")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"
SIZE = 64


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory):
    """AlexNet's shape with few channels and random weights."""
    generator = torch.Generator().manual_seed(0)
    weights, channels = {}, 3
    for i, (width, kernel) in enumerate([(4, 11), (5, 5), (6, 3), (4, 3), (3, 3)]):
        weights[f"conv.{i}.weight"] = torch.randn(width, channels, kernel, kernel, generator=generator) / kernel
        weights[f"conv.{i}.bias"] = torch.zeros(width)
        weights[f"head.{i}"] = torch.rand(width, generator=generator)
        channels = width
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture
def photo():
    """A smooth picture with a little noise."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    picture = np.stack([200 * x + 20, 200 * y + 20, 100 * (x + y) + 20], -1)
    return (picture + np.random.default_rng(0).integers(0, 8, picture.shape)).astype(np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[20:40, 24:48] = True
    return mask


def write_data(folder: Path, photo: np.ndarray, mask: np.ndarray, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.roll(photo, number, 1)).save(folder / f"{number:06d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{number:06d}.mask.png")
        (folder / f"{number:06d}.json").write_text(json.dumps({"mask": "blob" if number else "strokes"}))
    return folder


def test_psnr_counts_the_hole_alone(quality, photo, mask):
    picture = photo.copy()
    picture[mask] -= 10
    expected = 20 * np.log10(255 / 10)
    assert quality.psnr_in_hole(picture, photo, mask) == pytest.approx(expected)
    picture[~mask] = 0
    assert quality.psnr_in_hole(picture, photo, mask) == pytest.approx(expected)
    assert quality.psnr_in_hole(photo, photo, mask) == float("inf")


def test_ssim_follows_its_formula(quality, photo, mask):
    # A flat picture of value a against a flat one of b: variances are zero, the luminance term is left.
    a, b, c1 = 100.0, 150.0, (0.01 * 255) ** 2
    flat = [np.full((SIZE, SIZE, 3), value, np.uint8) for value in (a, b)]
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert quality.ssim_in_hole(*flat, mask) == pytest.approx(expected, abs=1e-6)
    assert quality.ssim_in_hole(photo, photo, mask) == pytest.approx(1)
    # What is 6 px and more away from the hole is out of the window's reach.
    picture = photo.copy()
    picture[:14], picture[46:], picture[:, :18], picture[:, 54:] = 0, 0, 0, 0
    assert quality.ssim_in_hole(picture, photo, mask) == pytest.approx(1, abs=1e-3)


def test_lpips_in_hole_and_picture(quality, photo, mask, lpips_weights):
    lpips = LPIPS.from_pretrained(lpips_weights)
    assert quality.lpips_in_hole_and_picture(lpips, photo, photo, mask) == (0, 0)
    blanked = quality.blank_hole(photo, mask)
    in_hole, whole = quality.lpips_in_hole_and_picture(lpips, blanked, photo, mask)
    a, b = (torch.tensor(array).permute(2, 0, 1)[None].float() / 127.5 - 1 for array in (blanked, photo))
    assert whole == pytest.approx(lpips(a, b).item(), rel=1e-5)
    distances = distance_map(lpips.distances(a, b), mask.shape)[0].numpy()
    assert in_hole == pytest.approx(distances[mask].mean(), rel=1e-5)
    assert in_hole > distances[~mask].mean()


def test_nothing_of_the_hole_reaches_a_method(quality, photo, mask, lpips_weights):
    seen = []

    def spy(blanked, mask, index):
        seen.append(blanked.copy())
        return np.zeros_like(blanked)

    other = photo.copy()
    other[mask] = 255 - other[mask]
    lpips = LPIPS.from_pretrained(lpips_weights)
    for truth in (photo, other):
        _, picture = quality.measure(quality.Sample("a", truth, mask, "blob"), spy, 0, lpips)
        np.testing.assert_array_equal(picture[~mask], photo[~mask])
        assert (picture[mask] == 0).all()
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0][mask], np.broadcast_to(photo[~mask].mean(0).round(), (mask.sum(), 3)))


def test_opencv_continues_a_gradient_better_than_the_mean_colour(quality, photo, mask, lpips_weights):
    lpips = LPIPS.from_pretrained(lpips_weights)
    sample = quality.Sample("a", photo, mask, "blob")
    scores = {name: quality.measure(sample, method, 0, lpips)[0] for name, method in quality.BASELINES.items()}
    for name in ("OpenCV Telea", "OpenCV Navier–Stokes"):
        assert scores[name]["psnr"] > scores["mean colour"]["psnr"] + 3
        assert scores[name]["lpips_hole"] < scores["mean colour"]["lpips_hole"]


def test_folder_and_tar_hold_the_same_samples(quality, photo, mask, tmp_path):
    folder = write_data(tmp_path / "data", photo, mask)
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for path in folder.iterdir():
            archive.add(path, path.name)
    for a, b in zip(quality.read_samples(folder), quality.read_samples(tmp_path / "data.tar"), strict=True):
        assert (a.name, a.kind) == (b.name, b.kind)
        np.testing.assert_array_equal(a.photo, b.photo)
        np.testing.assert_array_equal(a.mask, mask)
    assert [sample.name for sample in quality.read_samples(folder, limit=2)] == ["000000", "000002"]
    small = next(quality.read_samples(folder, resolution=32))
    assert small.photo.shape == (32, 32, 3)
    assert small.mask.dtype == bool
    assert small.mask.mean() == pytest.approx(mask.mean(), abs=0.01)


def test_wrong_data_is_refused(quality, photo, mask, tmp_path):
    def read(path):
        return list(quality.read_samples(path))

    with pytest.raises(ValueError, match=r"`data`.*neither"):
        read(tmp_path / "absent.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold photos"):
        read(tmp_path / "empty")
    folder = write_data(tmp_path / "data", photo, mask, 1)
    Image.new("L", (SIZE, SIZE - 1), 255).save(folder / "000000.mask.png")
    with pytest.raises(ValueError, match="sizes"):
        read(folder)
    Image.new("L", (SIZE, SIZE), 0).save(folder / "000000.mask.png")
    with pytest.raises(ValueError, match="with a hole"):
        read(folder)
    (folder / "000000.mask.png").unlink()
    with pytest.raises(ValueError, match=r"no 000000\.mask\.png"):
        read(folder)


def test_means_by_kind_of_hole(quality):
    def picture(kind, value):
        return {"mask": kind, "scores": {"x": dict.fromkeys(quality.METRICS, value)}}

    summary = quality.summarise([picture("blob", 1.0), picture("blob", 2.0), picture("strokes", 6.0)])
    assert [(kind, group["count"]) for kind, group in summary.items()] == [("all", 3), ("blob", 2), ("strokes", 1)]
    assert [group["scores"]["x"]["psnr"] for group in summary.values()] == [3.0, 1.5, 6.0]
    table = quality.markdown_table(summary)
    assert "| x | 3.00 | 3.000 | 3.000 | 3.000 | 3.00 |" in table
    assert "**Holes: strokes** (1 pictures)" in table
    assert list(quality.summarise([picture("blob", 1.0)])) == ["all"]


def test_main_prints_a_table_and_writes_pictures_and_json(quality, photo, mask, lpips_weights, tmp_path, capsys):
    folder = write_data(tmp_path / "data", photo, mask)
    options = ["--data", folder, "--lpips_weights", lpips_weights, "--output", tmp_path / "sheets"]
    quality.main([str(option) for option in [*options, "--json", tmp_path / "scores.json"]])
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in quality.BASELINES)
    report = json.loads((tmp_path / "scores.json").read_text())
    assert [picture["name"] for picture in report["pictures"]] == ["000000", "000001", "000002"]
    assert report["means"]["blob"]["count"] == 2
    # Input, three baselines and the photo.
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "000000.png"))
    assert sheet.shape == (SIZE + 20, 5 * SIZE, 3)
    np.testing.assert_array_equal(sheet[20:, -SIZE:], photo)


def test_wrong_options_are_refused(quality, capsys):
    with pytest.raises(SystemExit) as error:
        quality.main(["--data", "x", "--limit", "0"])
    assert error.value.code == 2
    assert "--limit" in capsys.readouterr().err


def test_main_with_a_model(quality, tiny_pipeline, photo, mask, lpips_weights, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    folder = write_data(tmp_path / "data", photo, mask, 1)
    options = ["--data", folder, "--lpips_weights", lpips_weights, "--model", tmp_path / "model", "--steps", 2]
    scores = []
    for run in range(2):
        quality.main([str(option) for option in [*options, "--json", tmp_path / f"{run}.json"]])
        scores.append(json.loads((tmp_path / f"{run}.json").read_text())["pictures"][0]["scores"]["model"])
        assert "| model |" in capsys.readouterr().out
    assert scores[0]["psnr"] == scores[1]["psnr"]  # the seed is fixed
    assert np.isfinite(list(scores[0].values())).all()
