#!/usr/bin/env python3
"""Makes a table of the paper anew: trains, scores and times its rows, and prints the paper's numbers beside.

    python benchmarks/tables.py benchmarks/tables/table6-portraits.toml mine.toml --output runs/table6

The first TOML file states what the paper does. Further ones are laid over it and say what only you know, such as

    [quality]
    data = "celebahq/"

A table `[rows."NAME"]` is a row; what stands outside of `rows` is the default of all. A row may have

- `script` and `train`: a script of `training/` and its options, with `unet`, the arguments of the U-Net, as
  `--unet_config`; what was trained is the row's method. Parameters and multiply-adds (by the literal formulas) of
  `unet` are counted without training.
- `method`, as in `quality.py`: what fills, if nothing is trained.
- `quality` and `efficiency`: options of `benchmarks/quality.py` and `benchmarks/efficiency.py`, which are run.
- `paper`: the paper's own numbers.

A row without a method is printed with the paper's numbers alone. Each command is a process of its own and is printed
before it runs, so that only one model at a time is in memory. The same command goes on with a table that was
interrupted, and leaves alone what is done; `--dry_run` prints commands and what is known so far.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from efficiency import COLUMNS, count_literal_multiply_adds, format_value
from quality_report import FORMATS, METRICS

from diffusers_moebius.evaluation.methods import read_toml
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel

ROOT = Path(__file__).resolve().parents[1]
HEADS = METRICS | {key: head for key, head, *_ in COLUMNS}
ENTRIES = {"method", "script", "train", "unet", "quality", "efficiency", "paper"}


def merge(base: dict, over: dict) -> dict:
    """Lays one table over another, key by key."""
    both = {key: merge(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return {**base, **over, **both}


def read_table(paths: list[str]) -> tuple[str, dict[str, dict]]:
    """
    Reads the rows of a table.

    Args:
        paths (`list[str]`): TOML files; each is laid over those before it.

    Returns:
        `tuple[str, dict[str, dict]]`: The title, and the rows by name.

    Raises:
        ValueError: If there are no rows, or entries that are not known.
    """
    table = {}
    for path in paths:
        table = merge(table, read_toml(path))
    title, rows = table.pop("title", ""), table.pop("rows", {})
    if not rows:
        raise ValueError(f"`files` must have rows, but {', '.join(map(str, paths))} have none.")
    rows = {name: merge(table, row) for name, row in rows.items()}
    unknown = {entry for row in rows.values() for entry in row} - ENTRIES
    if unknown:
        raise ValueError(f"`files` may have the entries {sorted(ENTRIES)} in a row, but have {sorted(unknown)}.")
    return title, rows


def as_options(entries: dict) -> list[str]:
    """Writes a table of TOML as options: `true` is a switch, `false` leaves it out."""
    options = []
    for name, value in entries.items():
        if value is not False:
            values = value if isinstance(value, list) else [value]
            options += [f"--{name}", *(str(each) for each in values if each is not True)]
    return options


def row_commands(name: str, row: dict, folder: Path) -> list[tuple[Path, list[str]]]:
    """What is to be run for a row, each with the file that shows that it was; none if it has no method."""
    commands, method = [], row.get("method")
    if "script" in row:
        method = str(folder / "model")
        options = row.get("train", {}) | {"output_dir": method, "resume_from_checkpoint": "latest"}
        if "unet" in row:
            options["unet_config"] = str(folder / "unet.json")
        script = str(ROOT / "training" / row["script"])
        commands.append((folder / "model" / "model_index.json", [script, *as_options(options)]))
    if not method:
        return []
    for script, file, option in (("quality", "report.json", "results"), ("efficiency", "efficiency.json", "json")):
        if script in row:
            path = folder / file
            options = row[script] | {option: str(folder if option == "results" else path)}
            command = [str(ROOT / "benchmarks" / f"{script}.py"), "--method", f"{name}={method}", *as_options(options)]
            commands.append((path, command))
    return commands


def count_unet(config: dict) -> dict[str, float]:
    """Parameters, with those of the category embedder, and multiply-adds by the literal formulas."""
    with torch.device("meta"):
        unet = MoebiusUNet2DModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    context = (unet.config.get("context_length", 10), unet.config.encoder_hid_dim)
    return {
        "parameters": unet.num_parameters() + 2 * context[0] * context[1],
        "multiply_adds_literal": count_literal_multiply_adds(unet, context),
    }


def measured(name: str, row: dict, folder: Path) -> dict[str, float]:
    """What is known of a row so far."""
    values = count_unet(row["unet"]) if "unet" in row else {}
    if (folder / "report.json").is_file():
        values |= json.loads((folder / "report.json").read_text())["means"]["all"]["scores"][name]
    if (folder / "efficiency.json").is_file():
        values |= json.loads((folder / "efficiency.json").read_text())[name]
    return values


def format_cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return FORMATS.get(key, "{:.2f}").format(value) if key in METRICS else format_value(key, value)


def table_markdown(title: str, rows: dict[str, dict], values: dict[str, dict[str, float]]) -> str:
    """
    Writes the table.

    Args:
        title (`str`): Its title.
        rows (`dict[str, dict]`): Of [`read_table`].
        values (`dict[str, dict[str, float]]`): What was measured of each row.
    """
    keys = [key for key in HEADS if any(key in row.get("paper", {}) for row in rows.values())]
    lines = [f"**{title}**", "", "| | " + " | ".join(f"{HEADS[key]} | paper" for key in keys) + " |"]
    lines.append("|---|" + "---:|" * (2 * len(keys)))
    for name, row in rows.items():
        pairs = ((key, source.get(key)) for key in keys for source in (values[name], row.get("paper", {})))
        lines.append(f"| {name} | " + " | ".join(format_cell(key, value) for key, value in pairs) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("files", nargs="+", help="TOML file of a table, and files that are laid over it")
    add("--output", type=Path, required=True, help="folder for what is trained and measured, and for table.md")
    add(
        "--launch",
        default=sys.executable,
        help="trains and scores, such as 'accelerate launch --num_processes 4'",
    )
    add("--rows", nargs="+", help="only these are run; default: all")
    add("--dry_run", action="store_true", help="run nothing")
    args = parser.parse_args(arguments)
    title, rows = read_table(args.files)
    unknown = set(args.rows or ()) - set(rows)
    if unknown:
        raise ValueError(f"`--rows` must be of {list(rows)}, but are {sorted(unknown)}.")
    folders = {name: args.output / re.sub(r"[^\w.+-]+", "-", name) for name in rows}
    for name in args.rows or rows:
        for done, command in row_commands(name, rows[name], folders[name]):
            alone = "efficiency.py" in command[0]  # one process measures
            command = [*([sys.executable] if alone else shlex.split(args.launch)), *command]
            print(f"# {name}{': done' if done.exists() else ''}\n{shlex.join(command)}", flush=True)
            if args.dry_run or done.exists():
                continue
            folders[name].mkdir(parents=True, exist_ok=True)
            if "unet" in rows[name]:
                (folders[name] / "unet.json").write_text(json.dumps(rows[name]["unet"], indent=4) + "\n")
            if subprocess.run(command).returncode != 0:
                raise ValueError(f"the row {name!r} failed, see above; the same command goes on with it")
    text = table_markdown(title, rows, {name: measured(name, rows[name], folders[name]) for name in rows})
    print(f"\n{text}")
    if not args.dry_run:
        (args.output / "table.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"tables.py: {error}")
