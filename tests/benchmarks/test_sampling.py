import json
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def sampling(import_script):
    return import_script("sampling")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 16:40] = 255
    for number in range(2):
        Image.fromarray(random.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}.mask.png")
    return folder


def test_rows_are_compared_with_the_reference_and_the_photo(sampling, lpips, data, tiny_pipeline, tmp_path):
    options = ["--data", data, "--steps", "2", "4", "--reference_steps", "4", "--sampler_steps", "4"]
    args = sampling.parse_args([str(option) for option in [*options, "--json", tmp_path / "scores.json"]])
    scheduler = tiny_pipeline.scheduler
    samples = sampling.Samples(data, limit=1)
    results = sampling.compare(args, tiny_pipeline, lpips, samples)
    assert json.loads((tmp_path / "scores.json").read_text()) == results
    assert tiny_pipeline.scheduler is scheduler

    first = {(row["name"], row["steps"]): row for row in results if row["table"] == "Samplers and steps"}
    assert len(first) == 2 * len(sampling.SAMPLERS)
    same = first["DDIM", 4]["scores"]  # the reference itself
    assert same["psnr_reference"] == 100 and same["lpips_reference"] == 0
    assert first["DDIM", 2]["scores"]["psnr_reference"] < 100
    assert first["DDIM", 2]["evaluations"] == 4  # the pipeline guides by default
    guided = {
        (row["name"], row["steps"]): row["evaluations"] for row in results if row["table"].startswith("Guidance")
    }
    assert guided == {
        ("steps 1 to 4 guided", 4): 8,
        ("steps 1 to 3 guided", 4): 7,
        ("steps 1 to 2 guided", 4): 6,
        ("steps 1 to 1 guided", 4): 5,
        ("steps 2 to 4 guided", 4): 7,
        ("steps 3 to 4 guided", 4): 6,
        ("steps 4 to 4 guided", 4): 5,
        ("no step guided", 4): 4,
        ("all steps guided", 2): 4,
        ("all steps guided", 3): 6,
    }
    starts = {row["name"]: row["evaluations"] for row in results if row["table"] == "Starting points"}
    assert starts["pure noise"] == 8 and starts["fill, strength 0.5"] == 4

    table = sampling.markdown_tables(args, results)
    assert table.count("**") == 6
    assert f"| DDIM | 4 | 8 | 100.00 | 0.000 | {same['psnr_photo']:.2f} | {same['lpips_photo']:.3f} |" in table


@pytest.mark.parametrize("option", ["--limit", "--steps", "--sampler_steps"])
def test_wrong_options_are_refused(sampling, capsys, option):
    with pytest.raises(SystemExit) as error:
        sampling.parse_args(["--data", "x", option, "0"])
    assert error.value.code == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words", [([], "extra `lpips`"), (["--lpips_weights", "none.safetensors"], "none.safe")]
)
def test_without_lpips_it_says_what_is_missing(sampling, data, monkeypatch, options, words):
    monkeypatch.setitem(sys.modules, "lpips", None)
    loading = lambda *args, **options: pytest.fail("the model was loaded")  # noqa: E731
    monkeypatch.setattr(sampling.MoebiusInpaintPipeline, "from_pretrained", loading)
    with pytest.raises(SystemExit) as caught:
        sampling.main(["--data", str(data), *options])
    assert words in str(caught.value) and "`--lpips_weights`" in str(caught.value)
