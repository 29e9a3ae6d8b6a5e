"""What an evaluation keeps while it runs, and the tables it ends with."""

import base64
import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from quality_metrics import frechet_distance

METRICS = {
    "fid": "FID ↓",
    "lpips_picture": "LPIPS of the picture ↓",
    "psnr_picture": "PSNR of the picture ↑",
    "ssim_picture": "SSIM of the picture ↑",
    "psnr": "PSNR in the hole ↑",
    "ssim": "SSIM in the hole ↑",
    "lpips_hole": "LPIPS in the hole ↓",
    "lpips_vgg_hole": "LPIPS-VGG in the hole ↓",
    "lpips_vgg_picture": "LPIPS-VGG of the picture ↓",
    "seconds": "s/picture",
}
FORMATS = {name: "{:.3f}" for name in METRICS if name.startswith(("ssim", "lpips"))}
# The columns of `custom` and of the paper's protocols; the JSON file holds every score.
HOLE_COLUMNS = ("psnr", "ssim", "lpips_hole", "lpips_vgg_hole", "lpips_picture", "seconds")
PAPER_COLUMNS = ("fid", "lpips_picture", "psnr_picture", "ssim_picture", "seconds")
INCEPTION_FEATURES = 2048


def encode_features(features: np.ndarray) -> str:
    """Writes features as text that JSON can hold, without loss."""
    return base64.b64encode(features.astype("<f4").tobytes()).decode()


def decode_features(text: str) -> np.ndarray:
    """Reads what `encode_features` wrote."""
    return np.frombuffer(base64.b64decode(text), "<f4")


def picture_path(folder: Path, method: str, name: str) -> Path:
    """Where a method's picture of a photo lies, or for `photo`, `input` and `mask` those."""
    return folder / re.sub(r"[^\w.,=-]+", "-", method) / f"{name}.png"


class Journal:
    """
    The scores of each picture in a folder, written at once, so that an interrupted run goes on.

    Each process appends to a file of its own; a line that was cut off is measured again.

    Args:
        folder (`str` or `Path`): Made if it does not exist.
        settings (`dict`): What the scores depend on. Main process and others may open one folder at once.
        process_index (`int`, defaults to 0): Number of this process.

    Raises:
        ValueError: If the folder was begun with other settings, or holds something else.
    """

    def __init__(self, folder: str | Path, settings: dict, process_index: int = 0):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`--results` must be a folder, but {str(folder)!r} is a file.")
        file = self.folder / "settings.json"
        if file.is_file():
            begun = json.loads(file.read_text())
            changed = [name for name in {**begun, **self.settings} if begun.get(name) != self.settings.get(name)]
            if changed:
                changes = ", ".join(f"{name} {begun.get(name)!r} to {self.settings.get(name)!r}" for name in changed)
                raise ValueError(
                    f"`--results` {str(folder)!r} was begun with other settings: {changes}. "
                    "Go on with the same ones, or name another folder."
                )
        elif self.folder.is_dir() and any(self.folder.glob("scores-*.jsonl")):
            raise ValueError(f"`--results` {str(folder)!r} holds scores but no settings.json; name another folder.")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{process_index}.part")
            part.write_text(json.dumps(self.settings, indent=2) + "\n")
            part.replace(file)
        self.file = self.folder / f"scores-{process_index:05d}.jsonl"

    def read(self) -> dict[int, dict]:
        """Returns the pictures that are done, by their number."""
        done = {}
        for file in sorted(self.folder.glob("scores-*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    picture = json.loads(line)
                except json.JSONDecodeError:
                    continue
                done[picture["index"]] = picture
        return done

    def write(self, picture: dict) -> None:
        """Appends one picture."""
        # A line that an interrupted run left unfinished must not swallow this one.
        with self.file.open("ab+") as stream:
            if stream.tell() > 0:
                stream.seek(-1, 2)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(json.dumps(picture).encode() + b"\n")


def summarise(pictures: list[dict]) -> dict[str, dict]:
    """
    Averages the scores over all pictures and over those of each kind of hole; where there are features, adds the FID.

    Args:
        pictures (`list[dict]`): Each with `mask`, the kind of hole, `scores`, metrics by method, and if the FID is
            wanted `features` by method, under `photo` those of the photo itself.

    Returns:
        `dict`: `{"all": {"count": int, "scores": {method: {metric: float}}}, kind: ...}`. The FID is that of all
        pictures; it says nothing about few.
    """
    kinds = sorted({picture["mask"] for picture in pictures})
    groups = {"all": pictures}
    if len(kinds) > 1:
        groups |= {kind: [picture for picture in pictures if picture["mask"] == kind] for kind in kinds}
    summary = {
        kind: {
            "count": len(members),
            "scores": {
                method: {
                    metric: float(np.mean([picture["scores"][method][metric] for picture in members]))
                    for metric in scores
                }
                for method, scores in members[0]["scores"].items()
            },
        }
        for kind, members in groups.items()
    }
    if len(pictures) > 1 and "features" in pictures[0]:
        photos = stack_features(pictures, "photo")
        for method, scores in summary["all"]["scores"].items():
            scores["fid"] = frechet_distance(stack_features(pictures, method), photos)
    return summary


def stack_features(pictures: list[dict], method: str) -> np.ndarray:
    """The features of a method's pictures as `[pictures, features]`."""
    return np.stack([decode_features(picture["features"][method]) for picture in pictures])


def markdown_table(summary: dict[str, dict], columns: tuple[str, ...] = HOLE_COLUMNS) -> str:
    """Writes what `summarise` returns as one Markdown table for each kind of hole; unmeasured columns are left out."""
    tables = []
    for kind, group in summary.items():
        title = "All holes" if kind == "all" else f"Holes: {kind}"
        measured = [metric for metric in columns if all(metric in scores for scores in group["scores"].values())]
        lines = [f"**{title}** ({group['count']} pictures)", ""]
        lines.append("| method | " + " | ".join(METRICS[metric] for metric in measured) + " |")
        lines.append("|---|" + "---:|" * len(measured))
        for method, scores in group["scores"].items():
            cells = [FORMATS.get(metric, "{:.2f}").format(scores[metric]) for metric in measured]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def describe_environment(device: str) -> dict[str, str]:
    """Versions and machine that the numbers were made with."""
    versions = {"python": platform.python_version()}
    for package in (
        "diffusers-moebius",
        "torch",
        "diffusers",
        "scikit-image",
        "opencv-python-headless",
        "PyPatchMatch",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.device(device).type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = platform.processor() or platform.machine()
        if Path("/proc/cpuinfo").is_file():
            names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
            machine = f"{names[0].partition(':')[2].strip()}, {len(names)} cores" if names else machine
    return {"machine": machine, "system": platform.system(), **versions}


def write_report(folder: str | Path, report: dict, markdown: str) -> None:
    """Writes `report.json` and `report.md`, each complete or not at all."""
    for name, text in (("report.json", json.dumps(report, indent=2)), ("report.md", markdown)):
        part = Path(folder) / f"{name}.part"
        part.write_text(text + "\n")
        part.replace(Path(folder) / name)


def report_markdown(report: dict, columns: tuple[str, ...]) -> str:
    """
    Writes a report for people.

    Args:
        report (`dict`): `protocol`, `description`, `reported`, `command`, `environment`, `settings`, `notes` and
            `means`.
        columns (`tuple[str, ...]`): Metrics to show.
    """
    lines = [f"# {report['protocol']}", "", markdown_table(report["means"], columns), ""]
    if report["reported"]:
        lines += [f"The paper reports {report['reported']} ({report['description']}); not measured here.", ""]
    lines += [f"- {note}" for note in report["notes"]]
    lines += [f"- {name}: {value}" for name, value in report["environment"].items()]
    lines += [f"- {name}: {value}" for name, value in report["settings"].items() if value is not None]
    lines += ["", "```", report["command"], "```"]
    return "\n".join(lines)
