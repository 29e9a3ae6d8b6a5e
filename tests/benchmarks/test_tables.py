import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("benchmarks/tables/*.toml"), *ROOT.glob("training/recipes/table?.toml")])


@pytest.fixture(scope="module")
def tables(import_script):
    return import_script("tables")


def write_photos(folder):
    folder.mkdir()
    for number in range(2):
        photo = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(photo).save(folder / f"{number}.png")
        mask = np.zeros((64, 64), np.uint8)
        mask[16:40, 20:44] = 255
        Image.fromarray(mask).save(folder / f"{number}.mask.png")
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_there_fits_the_scripts(tables, file, tmp_path, monkeypatch):
    """Every command of every table is one that its script understands."""
    _, rows = tables.read_table([file])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "training")
    parsers = {name: importlib.import_module(name).parse_args for name in ("quality", "train_distillation")}
    for name, row in rows.items():
        commands = tables.row_commands(name, row, tmp_path)
        assert commands or "method" not in row
        for _, (script, *options) in commands:
            assert Path(script).is_file()
            if Path(script).stem in parsers:
                parsers[Path(script).stem]([*options, "--data", "x"] if "quality" in script else options)
        assert row["paper"] and set(row["paper"]) <= set(tables.HEADS)


def test_later_files_are_laid_over_earlier_ones(tables, tmp_path):
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('method = "a"\n[quality]\nsteps = 2\nlimit = 3\n[rows.x]\n[rows.y.quality]\nsteps = 5\n')
    second.write_text('method = "b"\n[quality]\ndata = "d"\nlimit = false\n')
    _, rows = tables.read_table([first, second])
    assert rows["x"] == {"method": "b", "quality": {"steps": 2, "limit": False, "data": "d"}}
    assert rows["y"]["quality"]["steps"] == 5
    assert tables.as_options({"a": [1, 2], "b": True, "c": False, "d": 0.5}) == ["--a", "1", "2", "--b", "--d", "0.5"]
    second.write_text("[rows.x]\nsteps = 1\n")
    with pytest.raises(ValueError, match="steps"):
        tables.read_table([second])
    second.write_text("")
    with pytest.raises(ValueError, match="rows"):
        tables.read_table([second])


def test_variants_are_counted_without_training(tables):
    _, rows = tables.read_table([ROOT / "training" / "recipes" / "table2.toml"])
    for name in ("5 GLA-CA-FFN-DWConv", "9 Lλ-Iλ-MixFFN-DWConv KD"):
        counted, paper = tables.count_unet(rows[name]["unet"]), rows[name]["paper"]
        assert counted["parameters"] == pytest.approx(paper["parameters"], rel=0.002)
        assert counted["multiply_adds_literal"] == pytest.approx(paper["multiply_adds_literal"], rel=0.03)


@pytest.mark.slow
def test_a_table_is_run_printed_and_gone_on_with(tables, tiny_pipeline, tmp_path, capfd):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    data = write_photos(tmp_path / "data")
    (tmp_path / "table.toml").write_text(
        f"""
        title = "A table"
        [quality]
        data = "{data}"
        [rows.ours]
        method = "{tmp_path}/model"
        quality = {{ steps = 2 }}
        efficiency = {{ resolution = 128, repeats = 1, steps = 2 }}
        paper = {{ psnr = 12.5, parameters = 226e6 }}
        [rows.theirs]
        paper = {{ psnr = 13.25 }}
        """
    )
    command = [str(tmp_path / "table.toml"), "--output", str(tmp_path / "out")]
    tables.main([*command, "--dry_run"])
    assert "--steps 2" in capfd.readouterr().out and not (tmp_path / "out").exists()
    tables.main(command)
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    report = json.loads((tmp_path / "out" / "ours" / "report.json").read_text())
    psnr = report["means"]["all"]["scores"]["ours"]["psnr"]
    models = (tiny_pipeline.unet, tiny_pipeline.lcg_embedder)
    parameters = sum(p.numel() for model in models for p in model.parameters())
    assert f"| ours | {psnr:.2f} | 12.50 | {parameters / 1e6:.2f} M | 226.00 M |" in lines
    assert "| theirs | – | 13.25 | – | – |" in lines
    capfd.readouterr()
    tables.main(command)
    assert capfd.readouterr().out.count(": done") == 2
    with pytest.raises(ValueError, match="`--rows`"):
        tables.main([*command, "--rows", "nobody"])
    (tmp_path / "out" / "ours" / "efficiency.json").unlink()
    (tmp_path / "model" / "model_index.json").unlink()
    with pytest.raises(ValueError, match="'ours' failed"):
        tables.main(command)
