import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "latency.py"
TINY = {
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "num_attention_heads": 4,
    "cross_attention_dim": 16,
    "encoder_hid_dim": 24,
    "local_window_size": 5,
    "norm_num_groups": 8,
}


@pytest.fixture(scope="module")
def latency(import_script):
    return import_script("latency")


def test_main_prints_tables_and_writes_json(latency, tmp_path, capsys, monkeypatch):
    # A fresh process takes seconds to import torch; what it would do is tested below.
    monkeypatch.setattr(latency, "measure_memory", lambda variant, *_: 2**20 if variant == "reference" else 2**19)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    options = ["--config", tmp_path / "tiny.json", "--sizes", "96x64", "--batches", "--rounds", "2", "--skip_command"]
    options += [
        "--devices",
        "cpu",
        "--json",
        tmp_path / "out.json",
        "--variants",
        "reference",
        "fast",
        "folded",
        "fp16",
    ]
    latency.main([str(option) for option in options])
    table = capsys.readouterr().out
    assert "**96×64 px, batch 2**" in table and "fp16 | skipped: GPUs only" in table
    assert "| 96×64 | 2 | folded |" in table
    (result,) = json.loads((tmp_path / "out.json").read_text())["sizes"]
    rows = result["rows"]
    assert rows["reference"]["difference"] == 0 and rows["reference"]["wall_ratio"] == 1
    for name in ("fast", "folded"):
        assert 0 < rows[name]["difference"] < 1e-5
        assert len(rows[name]["wall"]) == len(rows[name]["cpu"]) == 2 and min(rows[name]["wall"]) > 0
    assert f"| {rows['folded']['wall_ratio']:.2f} |" in table and "| 0 MiB | 0.50 |" in table
    assert result["floor"] == pytest.approx(2 * rows["folded"]["multiply_adds"] / result["matrix_product_rate"])


def test_multiply_adds_of_the_full_model(latency):
    counts = {name: latency.count_multiply_adds(name, {}, 512, 512) / 1e9 for name in ("reference", "fast", "folded")}
    assert round(counts["reference"]) == 158  # as measured on the original release
    assert counts["folded"] < counts["fast"] < counts["reference"]
    # Two 3x3 convolutions after an enlargement, 1280 channels to 32x32 and 640 to 64x64, keep 9 of 36 products.
    saved = 9 * (32**2 * 1280**2 + 64**2 * 640**2) * 27 / 36 / 1e9
    assert counts["fast"] - counts["folded"] == pytest.approx(saved, rel=0.05)


def test_memory_of_a_step_is_seen(latency, monkeypatch):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory is read from /proc")

    def step(*inputs):
        return torch.ones(2**24).sum()  # 64 MiB

    monkeypatch.setattr(latency, "make_step", lambda *_: step)
    peak = latency._measure_memory("folded", TINY, "cpu", 64, 64, 2, torch.get_num_threads())
    assert 0.9 * 2**26 < peak < 1.5 * 2**26


def test_rows_that_fail_do_not_stop_the_others(latency, monkeypatch):
    make_step = latency.make_step

    def failing(variant, *arguments):
        if variant == "compiled":
            raise RuntimeError("no compiler\nmore")
        return make_step(variant, *arguments)

    monkeypatch.setattr(latency, "make_step", failing)
    results = latency.measure_times(["reference", "compiled", "folded"], TINY, "cpu", 64, 64, 2, 1)
    assert results["compiled"] == {"skipped": "RuntimeError: no compiler"}
    assert results["folded"]["difference"] < 1e-5


def test_bfloat16_needs_hardware(latency, monkeypatch):
    monkeypatch.setattr(latency, "cpu_has_bfloat16", lambda: False)
    assert "bfloat16" in latency.why_not("bf16", "cpu")
    assert latency.why_not("bf16", "cuda") is None
    monkeypatch.setattr(latency, "cpu_has_bfloat16", lambda: True)
    assert latency.why_not("bf16", "cpu") is None


def test_whole_runs_are_made_up_of_their_parts(latency, tmp_path):
    tiny = latency.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    tiny.save_pretrained(tmp_path)
    result = latency.measure_whole_run(TINY, "cpu", 20, 1, vae_widths=(8,) * 4, tiny_vae=str(tmp_path))
    parts, runs = result["parts"], result["runs"]
    assert result["difference"] < 0.05
    assert all(seconds > 0 for row in parts.values() for seconds in row.values())
    assert runs["original"]["denoise"] == pytest.approx(19 * parts["reference"]["guided step"])
    assert runs["default"]["encode"] == pytest.approx(2 * parts["prepared"]["encode"])
    assert runs["fast"]["decode"] == parts["prepared"]["tiny decode"]
    table = latency.whole_run_table(result)
    assert "| original |" in table and "| 1.000 |" in table


@pytest.mark.parametrize("arguments", [["--sizes", "500"], ["--sizes", "0"], ["--rounds", "0"], ["--batches", "3"]])
def test_wrong_options_are_refused(latency, capsys, arguments):
    with pytest.raises(SystemExit) as error:
        latency.main(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_memory_of_the_command_is_its_own(latency):
    """Not that of the process that measures, whose high-water mark Linux hands on to what it starts."""
    large = torch.ones(2**28)  # 1 GiB
    peak = int(subprocess.check_output([sys.executable, "-c", latency.PRINT_PEAK, sys.executable, "-c", ""]))
    assert large.sum() and 2**20 < peak < 2**28
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.check_output([sys.executable, "-c", latency.PRINT_PEAK, sys.executable, "-c", "exit(3)"])
