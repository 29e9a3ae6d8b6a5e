import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"


def test_tables_and_file(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = tmp_path / "training.json"
    sizes = ["--positions=48", "--width=32", "--student_widths", "16", "16", "32", "--teacher_widths", "16", "16"]
    module.main([*sizes, "32", "32", "--latent_size=8", "--batch_size=2", "--repeats=1", f"--output={output}"])
    result = json.loads(output.read_text())
    assert [row["part"] for row in result["attention"]] == ["after the projections", "whole layer"]
    assert all(row["error"] < 1e-5 and row["literal"] > 0 for row in result["attention"])
    assert [row["balance"] for row in result["balance"]] == ["added up", "release", "paper"]
    assert "| paper |" in capsys.readouterr().out
