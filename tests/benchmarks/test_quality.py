import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lpips_weights import make_weights
from PIL import Image
from safetensors.torch import save_file

from diffusers_moebius.evaluation.lpips import LPIPS, distance_map

pytest.importorskip("cv2")
pytest.importorskip("skimage")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"
SIZE = 64


@pytest.fixture(scope="module")
def quality(import_script):
    return import_script("quality")


@pytest.fixture(scope="module")
def metrics(quality):
    return sys.modules["quality_metrics"]


@pytest.fixture(scope="module")
def reports(quality):
    return sys.modules["quality_report"]


class MeanAndDeviation(torch.nn.Module):
    """Six features of a picture, with the interface of the Inception network."""

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pictures = pictures.float() / 255
        return torch.cat([pictures.mean((2, 3)), pictures.std((2, 3))], 1)


@pytest.fixture(scope="module")
def fid_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("fid") / "inception.pt"
    torch.jit.script(MeanAndDeviation()).save(str(path))
    return path


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(make_weights("alex"), path)
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


def test_psnr_in_hole_and_picture(metrics, photo, mask):
    picture = photo.copy()
    picture[mask] -= 10
    scores = metrics.score_picture(picture, photo, mask)
    assert scores["psnr"] == pytest.approx(20 * np.log10(255 / 10))
    assert scores["psnr_picture"] == pytest.approx(scores["psnr"] - 10 * np.log10(mask.mean()))
    assert set(scores) == {"psnr", "ssim", "psnr_picture", "ssim_picture"}  # without a network no LPIPS
    picture[~mask] = 0
    assert metrics.score_picture(picture, photo, mask)["psnr"] == scores["psnr"]
    assert metrics.psnr(photo, photo) == float("inf")


def test_ssim_follows_its_formula(metrics, photo, mask):
    def ssim_in_hole(picture, photo):
        return metrics.score_picture(picture, photo, mask)["ssim"]

    # A flat picture of value a against a flat one of b: variances are zero, the luminance term is left.
    a, b, c1 = 100.0, 150.0, (0.01 * 255) ** 2
    flat = [np.full((SIZE, SIZE, 3), value, np.uint8) for value in (a, b)]
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim_in_hole(*flat) == pytest.approx(expected, abs=1e-6)
    assert ssim_in_hole(photo, photo) == pytest.approx(1)
    # What is 6 px and more away from the hole is out of the window's reach.
    picture = photo.copy()
    picture[:14], picture[46:], picture[:, :18], picture[:, 54:] = 0, 0, 0, 0
    assert ssim_in_hole(picture, photo) == pytest.approx(1, abs=1e-3)


def test_lpips_in_hole_and_picture(quality, metrics, photo, mask, lpips_weights):
    lpips = LPIPS.from_pretrained(lpips_weights)
    assert metrics.lpips_in_hole_and_picture(lpips, photo, photo, mask) == (0, 0)
    blanked = quality.blank_hole(photo, mask)
    in_hole, whole = metrics.lpips_in_hole_and_picture(lpips, blanked, photo, mask)
    a, b = (torch.tensor(array).permute(2, 0, 1)[None].float() / 127.5 - 1 for array in (blanked, photo))
    assert whole == pytest.approx(lpips(a, b).item(), rel=1e-5)
    distances = distance_map(lpips.distances(a, b), mask.shape)[0].numpy()
    assert in_hole == pytest.approx(distances[mask].mean(), rel=1e-5)
    assert in_hole > distances[~mask].mean()


def test_nothing_of_the_hole_reaches_a_method(quality, photo, mask, lpips_weights):
    seen = []

    def spy(blanked, mask, name, seed):
        seen.append(blanked.copy())
        return np.zeros_like(blanked)

    other = photo.copy()
    other[mask] = 255 - other[mask]
    lpips = LPIPS.from_pretrained(lpips_weights)
    for truth in (photo, other):
        _, picture = quality.measure(quality.Sample("a", truth, mask, "blob"), spy, 0, [lpips])
        np.testing.assert_array_equal(picture[~mask], photo[~mask])
        assert (picture[mask] == 0).all()
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0][mask], np.broadcast_to(photo[~mask].mean(0).round(), (mask.sum(), 3)))


def test_opencv_continues_a_gradient_better_than_the_mean_colour(quality, photo, mask, lpips_weights):
    lpips = LPIPS.from_pretrained(lpips_weights)
    sample = quality.Sample("a", photo, mask, "blob")
    scores = {
        name: quality.measure(sample, quality.make_method(name), 0, [lpips])[0]
        for name in ("mean", "telea", "navier-stokes")
    }
    for name in ("telea", "navier-stokes"):
        assert scores[name]["psnr"] > scores["mean"]["psnr"] + 3
        assert scores[name]["lpips_hole"] < scores["mean"]["lpips_hole"]


def test_folder_and_tar_hold_the_same_samples(quality, photo, mask, tmp_path):
    folder = write_data(tmp_path / "data", photo, mask)
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for path in folder.iterdir():
            archive.add(path, path.name)
    for a, b in zip(quality.Samples(folder), quality.Samples(tmp_path / "data.tar"), strict=True):
        assert (a.name, a.kind) == (b.name, b.kind)
        np.testing.assert_array_equal(a.photo, b.photo)
        np.testing.assert_array_equal(a.mask, mask)
    assert [sample.name for sample in quality.Samples(folder, limit=2)] == ["000000", "000002"]
    small = quality.Samples(folder, resolution=32)[0]
    assert small.photo.shape == (32, 32, 3)
    assert small.mask.dtype == bool
    assert small.mask.mean() == pytest.approx(mask.mean(), abs=0.01)


def test_wrong_data_is_refused(quality, photo, mask, tmp_path):
    def read(path):
        return list(quality.Samples(path))

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
    (folder / "000000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"`data`.*readable.*000000\.png"):
        read(folder)
    (folder / "000000.mask.png").unlink()
    with pytest.raises(ValueError, match=r"no 000000\.mask\.png"):
        read(folder)


def test_means_by_kind_of_hole(reports):
    def picture(kind, value):
        return {"mask": kind, "scores": {"x": dict.fromkeys(reports.HOLE_COLUMNS, value)}}

    summary = reports.summarise([picture("blob", 1.0), picture("blob", 2.0), picture("strokes", 6.0)])
    assert [(kind, group["count"]) for kind, group in summary.items()] == [("all", 3), ("blob", 2), ("strokes", 1)]
    assert [group["scores"]["x"]["psnr"] for group in summary.values()] == [3.0, 1.5, 6.0]
    table = reports.markdown_table(summary)
    assert "| x | 3.00 | 3.000 | 3.000 | 3.000 | 3.000 | 3.00 |" in table
    assert "**Holes: strokes** (1 pictures)" in table
    assert list(reports.summarise([picture("blob", 1.0)])) == ["all"]


def test_main_prints_a_table_and_writes_pictures_and_json(quality, photo, mask, lpips_weights, tmp_path, capsys):
    folder = write_data(tmp_path / "data", photo, mask)
    options = ["--data", folder, "--lpips_weights", lpips_weights, "--output", tmp_path / "pictures"]
    quality.main([str(option) for option in [*options, "--json", tmp_path / "scores.json"]])
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in ("mean", "telea", "navier-stokes"))
    report = json.loads((tmp_path / "scores.json").read_text())
    assert [picture["name"] for picture in report["pictures"]] == ["000000", "000001", "000002"]
    assert report["means"]["blob"]["count"] == 2
    kept = {name: np.asarray(Image.open(tmp_path / "pictures" / name / "000000.png")) for name in ("photo", "telea")}
    np.testing.assert_array_equal(kept["photo"], photo)
    np.testing.assert_array_equal(kept["telea"][~mask], photo[~mask])
    # What a run kept can be scored again as pictures made elsewhere.
    again = ["--method", f"results:{tmp_path / 'pictures' / 'telea'}", "--json", tmp_path / "again.json"]
    quality.main([str(option) for option in [*options[:4], *again]])
    scores = json.loads((tmp_path / "again.json").read_text())["means"]["all"]["scores"]
    assert next(iter(scores.values()))["psnr"] == report["means"]["all"]["scores"]["telea"]["psnr"]


def test_wrong_options_are_refused(quality, capsys):
    with pytest.raises(SystemExit) as error:
        quality.main(["--data", "x", "--limit", "0"])
    assert error.value.code == 2
    assert "--limit" in capsys.readouterr().err


def test_main_with_a_model(quality, tiny_pipeline, photo, mask, lpips_weights, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    folder = write_data(tmp_path / "data", photo, mask, 1)
    options = ["--data", folder, "--lpips_weights", lpips_weights, "--method", f"model={tmp_path}/model", "--steps", 2]
    scores = []
    for run in range(2):
        quality.main([str(option) for option in [*options, "--json", tmp_path / f"{run}.json"]])
        scores.append(json.loads((tmp_path / f"{run}.json").read_text())["pictures"][0]["scores"]["model"])
        assert "| model |" in capsys.readouterr().out
    assert scores[0]["psnr"] == scores[1]["psnr"]  # the seed is fixed
    assert np.isfinite(list(scores[0].values())).all()


def test_frechet_distance_of_known_gaussians(metrics):
    # Independent features of means m and deviations s: |m1 - m2|^2 + sum (s1 - s2)^2, here for samples whose mean and
    # covariance are exact.
    generator = np.random.default_rng(0)
    raw = generator.standard_normal((50, 4))
    raw -= raw.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(raw, rowvar=False)), raw.T).T
    means, deviations = generator.normal(size=(2, 4)), generator.uniform(0.5, 2, (2, 4))
    first, second = (white * s + m for m, s in zip(means, deviations, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert metrics.frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    # Covariances that do not commute, against the general matrix root.
    linalg = pytest.importorskip("scipy.linalg")
    mixes = generator.normal(size=(2, 4, 4))
    a, b = white @ mixes[0], white @ mixes[1]
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    general = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(general, rel=1e-6)
    # More features than pictures: the covariance is singular, the distance of a shift is still exact.
    few = generator.standard_normal((5, 20))
    assert metrics.frechet_distance(few, few + 1) == pytest.approx(20, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet_distance(few[:1], few)
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet_distance(few * np.nan, few)


def test_protocols_crop_and_draw(quality, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    wide = np.concatenate([photo, photo[:, ::-1]], 1)
    for number in range(3):
        Image.fromarray(np.roll(wide, number, 1)).save(folder / f"{number}.png")
    for name in ("places2-test", "ffhq-256"):
        protocol = quality.PROTOCOLS[name]
        sample, again = quality.Samples(folder, protocol=protocol)[1], quality.Samples(folder, protocol=protocol)[1]
        assert sample.photo.shape == (protocol.resolution, protocol.resolution, 3)
        assert sample.mask.shape == sample.photo.shape[:2]
        assert protocol.mask_area[0] <= sample.mask.mean() <= protocol.mask_area[1]
        np.testing.assert_array_equal(sample.mask, again.mask)
        other = quality.Samples(folder, protocol=protocol, seed=1)[1]
        assert (other.mask != sample.mask).any()
    # A photo's hole does not depend on how many photos are taken; the crop is the middle of the photo.
    protocol = quality.PROTOCOLS["places2-256"]
    every, ends = quality.Samples(folder, protocol=protocol), quality.Samples(folder, protocol=protocol, limit=2)
    np.testing.assert_array_equal(every[2].mask, ends[1].mask)
    middle = Image.fromarray(wide[:, SIZE // 2 : SIZE // 2 + SIZE]).resize((256, 256), Image.Resampling.LANCZOS)
    assert np.abs(every[0].photo.astype(int) - np.asarray(middle))[:, 16:-16].max() <= 1


def test_protocols_take_masks_from_a_folder(quality, photo, mask, tmp_path):
    folder, masks = tmp_path / "photos", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    Image.fromarray(photo).save(folder / "a.png")
    protocol = quality.PROTOCOLS["ffhq-256"]
    with pytest.raises(ValueError, match=r"`masks`.*no a\.png or a\.mask\.png"):
        quality.Samples(folder, masks, protocol)
    with pytest.raises(ValueError, match=r"`masks`.*neither"):
        quality.Samples(folder, tmp_path / "absent", protocol)
    given = Image.fromarray(mask.astype(np.uint8) * 255)
    given.save(masks / "a.png")  # of the photo's size: cropped with it
    of_photo = quality.Samples(folder, masks, protocol)[0].mask
    assert of_photo.mean() == pytest.approx(mask.mean(), abs=0.01)
    given.resize((256, 256), Image.Resampling.NEAREST).save(masks / "a.png")  # of the protocol's size: taken as it is
    np.testing.assert_array_equal(quality.Samples(folder, masks, protocol)[0].mask, of_photo)
    given.resize((100, 100)).save(masks / "a.png")
    with pytest.raises(ValueError, match=r"`masks`.*sizes"):
        quality.Samples(folder, masks, protocol)[0]
    given.save(masks / "a.mask.png")
    (masks / "a.png").unlink()
    assert quality.Samples(folder, masks)[0].mask.sum() == mask.sum()  # `custom` takes such a folder as well


def test_protocol_sets_what_the_user_leaves_out(quality, capsys):
    args = quality.parse_args(["--protocol", "celebahq-512", "--data", "x"])
    assert (args.method, args.steps) == (["hustvl/Moebius/ft_celebahq"], 20)
    assert (args.guidance_scale, args.strength) == ([2.0], 0.99)
    args = quality.parse_args(["--protocol", "ffhq-256", "--data", "x", "--method", "folder", "--steps", "3"])
    assert (args.method, args.steps) == (["folder"], 3)
    wrong = {
        "--protocol": ["--protocol", "places3"],
        "--resolution": ["--protocol", "ffhq-256", "--resolution", "64"],
        "--guidance_scale": ["--guidance_scale", "1", "1"],
        "--seed": ["--seed", "-1"],
    }
    for option, arguments in wrong.items():
        with pytest.raises(SystemExit):
            quality.parse_args(["--data", "x", *arguments])
        assert option in capsys.readouterr().err


def run_main(quality, *options) -> None:
    quality.main([str(option) for option in options])


def test_sweep_with_fid(quality, tiny_pipeline, photo, mask, lpips_weights, fid_weights, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    options = ["--data", write_data(tmp_path / "data", photo, mask, 2), "--lpips_weights", lpips_weights]
    options += ["--method", f"model={tmp_path}/model", "mean", "--steps", 2, "--strength", 1]
    options += ["--fid_weights", fid_weights]
    results = tmp_path / "results"
    run_main(quality, *options, "--guidance_scale", 1, 2.5, "--results", results)
    table = capsys.readouterr().out
    assert "| model, guidance 1 |" in table
    assert "| model, guidance 2.5 |" in table
    report = json.loads((results / "report.json").read_text())
    scores = report["means"]["all"]["scores"]
    assert scores["model, guidance 1"]["psnr"] != scores["model, guidance 2.5"]["psnr"]
    # The FID is that of all photos against all pasted pictures, in the extractor's features.
    metrics, samples = sys.modules["quality_metrics"], quality.Samples(tmp_path / "data")
    blanked = [quality.blank_hole(sample.photo, sample.mask) for sample in samples]
    extractor = metrics.load_inception(fid_weights)
    expected = metrics.frechet_distance(
        np.stack([metrics.picture_features(extractor, picture) for picture in blanked]),
        np.stack([metrics.picture_features(extractor, sample.photo) for sample in samples]),
    )
    assert scores["mean"]["fid"] == pytest.approx(expected, rel=1e-6)
    markdown = (results / "report.md").read_text()
    assert "biased upwards" in markdown
    assert "torch: " in markdown
    assert "benchmarks/quality.py --data" in markdown


def test_named_protocol_without_networks(quality, tiny_pipeline, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for number in range(2):
        Image.fromarray(np.roll(photo, number, 1)).save(tmp_path / "data" / f"{number}.png")
    options = ["--protocol", "ffhq-256", "--data", tmp_path / "data", "--method", tmp_path / "model", "--steps", 2]
    run_main(quality, *options, "--results", tmp_path / "results")
    out, err = capsys.readouterr()
    assert "| method | PSNR of the picture ↑ | SSIM of the picture ↑ | s/picture |" in out
    assert "`--lpips_weights`" in err
    assert "`--fid_weights`" in err
    markdown = (tmp_path / "results" / "report.md").read_text()
    assert "FID was not measured" in markdown
    assert "not measured here" in markdown  # the paper's own scores are marked as such


def test_wrong_networks_are_refused(quality, metrics, photo, mask, tmp_path):
    folder = write_data(tmp_path / "data", photo, mask, 1)
    with pytest.raises(ValueError, match="`fid_weights`"):
        run_main(quality, "--data", folder, "--fid_weights", tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="`lpips_weights`"):
        run_main(quality, "--data", folder, "--lpips_weights", tmp_path / "absent.safetensors")
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match="TorchScript"):
        metrics.load_inception(tmp_path / "bad.pt")


def scores_of(report: Path) -> list:
    """All scores but the time, by picture."""
    pictures = json.loads(report.read_text())["pictures"]
    return [
        (p["index"], p["name"], {m: {k: v for k, v in s.items() if k != "seconds"} for m, s in p["scores"].items()})
        for p in pictures
    ]


def test_interrupted_run_goes_on(quality, photo, mask, lpips_weights, fid_weights, tmp_path, monkeypatch):
    folder, results = write_data(tmp_path / "data", photo, mask), tmp_path / "results"
    options = ["--data", folder, "--lpips_weights", lpips_weights, "--fid_weights", fid_weights]
    run_main(quality, *options, "--json", tmp_path / "whole.json")

    measured = []
    measure_methods = quality.measure_methods

    def interrupted(sample, *args):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(sample.name)
        return measure_methods(sample, *args)

    monkeypatch.setattr(quality, "measure_methods", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(quality, *options, "--results", results)
    assert not (results / "report.json").exists()
    # The second picture's line was cut off, as by a power failure: it is measured again, and no other.
    file = results / "scores-00000.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    measured.clear()
    monkeypatch.setattr(
        quality, "measure_methods", lambda s, *args: measured.append(s.name) or measure_methods(s, *args)
    )
    run_main(quality, *options, "--results", results)
    assert measured == ["000001", "000002"]
    assert scores_of(results / "report.json") == scores_of(tmp_path / "whole.json")
    whole, resumed = (
        json.loads(path.read_text())["means"]["all"] for path in (tmp_path / "whole.json", results / "report.json")
    )
    assert whole["scores"]["mean"]["fid"] == resumed["scores"]["mean"]["fid"]
    run_main(quality, *options, "--results", results)  # nothing is left to do
    assert measured == ["000001", "000002"]

    with pytest.raises(ValueError, match=r"`--results`.*seed 0 to 1"):
        run_main(quality, *options, "--results", results, "--seed", 1)
    Image.fromarray(photo).save(folder / "new.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "new.mask.png")
    with pytest.raises(ValueError, match=r"`--results`.*pictures 3 to 4"):
        run_main(quality, *options, "--results", results)
    (results / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"no settings\.json"):
        run_main(quality, *options, "--results", results)
    with pytest.raises(ValueError, match="is a file"):
        run_main(quality, *options, "--results", file)


def test_two_processes_give_the_numbers_of_one(
    quality, tiny_pipeline, photo, mask, lpips_weights, fid_weights, tmp_path
):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    options = ["--data", write_data(tmp_path / "data", photo, mask), "--lpips_weights", lpips_weights]
    options += ["--fid_weights", fid_weights, "--method", f"model={tmp_path}/model", "telea", "--steps", 2]
    options += ["--device", "cpu"]
    run_main(quality, *options, "--json", tmp_path / "one.json")
    # `accelerate launch --cpu --num_processes 2` starts one process only, unless MPI is there; torchrun starts two.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, SCRIPT, *options, "--json", tmp_path / "two.json", "--results", tmp_path / "results"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| model |") == 3  # all holes and two kinds, printed by one process alone
    assert json.loads((tmp_path / "two.json").read_text())["processes"] == 2
    assert len(list((tmp_path / "results").glob("scores-*.jsonl"))) == 2
    assert scores_of(tmp_path / "two.json") == scores_of(tmp_path / "one.json")
    one, two = (
        json.loads((tmp_path / name).read_text())["means"]["all"]["scores"] for name in ("one.json", "two.json")
    )
    assert {name: row["fid"] for name, row in one.items()} == {name: row["fid"] for name, row in two.items()}


def test_other_pipelines_have_their_own_settings(
    quality, tiny_pipeline, sdxl_inpaint_folder, photo, mask, lpips_weights, tmp_path, capsys
):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    settings = tmp_path / "methods.toml"
    text = f'[sdxl]\nrepository = "{sdxl_inpaint_folder}"\ncall = {{ num_inference_steps = 2, strength = 1.0 }}\n'
    settings.write_text(text)
    options = ["--data", write_data(tmp_path / "data", photo, mask, 1), "--lpips_weights", lpips_weights]
    options += ["--method", "sdxl", "--method", f"ours={tmp_path}/model", "--settings", settings, "--steps", 3]
    run_main(quality, *options, "--guidance_scale", 1, 2, "--results", tmp_path / "results")
    scores = json.loads((tmp_path / "results" / "report.json").read_text())["means"]["all"]["scores"]
    assert list(scores) == ["sdxl", "ours, guidance 1", "ours, guidance 2"]
    settings.write_text(text.replace("= 2", "= 1"))
    with pytest.raises(ValueError, match=r"`--results`.*num_inference_steps': 1"):
        run_main(quality, *options, "--guidance_scale", 1, 2, "--results", tmp_path / "results")


def test_a_protocol_draws_its_photos_once_for_all(quality, photo, tmp_path):
    from dataclasses import replace

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(photo).save(folder / f"{number:02d}.png")
    protocol = replace(quality.PROTOCOLS["lvis-512"], count=8)
    drawn = quality.Samples(folder, protocol=protocol)
    assert len(drawn) == len(set(drawn.names)) == 8 and drawn.names != [f"{number:02d}" for number in range(8)]
    assert drawn.names == quality.Samples(folder, protocol=protocol, seed=5).names
    few = quality.Samples(folder, protocol=protocol, limit=3)
    assert len(few) == 3 and set(few.names) < set(drawn.names)
    np.testing.assert_array_equal(few[2].mask, drawn[7].mask)
