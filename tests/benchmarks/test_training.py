import json


def test_tables_and_file(import_script, tmp_path, capsys):
    output = tmp_path / "training.json"
    sizes = ["--positions=48", "--width=32", "--student_widths", "16", "16", "32", "--teacher_widths", "16", "16"]
    import_script("training").main(
        [*sizes, "32", "32", "--latent_size=8", "--batch_size=2", "--repeats=1", f"--output={output}"]
    )
    result = json.loads(output.read_text())
    assert [row["part"] for row in result["attention"]] == ["after the projections", "whole layer"]
    assert all(row["error"] < 1e-5 and row["literal"] > 0 for row in result["attention"])
    assert [row["balance"] for row in result["balance"]] == ["added up", "release", "paper"]
    assert "| paper |" in capsys.readouterr().out
