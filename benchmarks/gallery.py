#!/usr/bin/env python3
"""Writes a page with the best, the median and the worst pictures of each method, each with a slider over the photo.

    python benchmarks/quality.py --method nano patchmatch --data photos-val.tar --results runs/val --output runs/val
    python benchmarks/gallery.py runs/val --metric lpips_hole -o gallery.html

It reads the report and the pictures of a run of `quality.py`, and holds all that it shows: one file, no network.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

from PIL import Image
from quality_report import FORMATS, METRICS, picture_path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1rem; }
figure { margin: 0; }
.slider { position: relative; --at: 50%; }
.slider img { display: block; width: 100%; }
.slider img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
.slider input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.slider::after {
  content: ""; position: absolute; inset: 0 auto 0 var(--at); width: 2px; background: white; box-shadow: 0 0 2px black;
  pointer-events: none;
}
.slider:focus-within { outline: 2px solid Highlight; outline-offset: 2px; }
figcaption { font-size: 0.85rem; display: flex; gap: 0.5rem; align-items: start; margin-top: 0.25rem; }
figcaption img { width: 64px; }
"""
FIGURE = """<figure>
<div class="slider"><img src="{result}" alt="Filled by {method}"><img src="{photo}" alt="The photo">
<input type="range" min="0" max="100" value="50" aria-label="Filled on the left, the photo on the right"
 oninput="this.parentNode.style.setProperty('--at', this.value + '%')"></div>
<figcaption><img src="{hole}" alt="The photo with its hole">{name}<br>{score}, {mask}</figcaption>
</figure>"""


def ranked(pictures: list[dict], method: str, metric: str, count: int) -> dict[str, list[dict]]:
    """
    The best, the median and the worst pictures of a method; none is in two groups.

    Args:
        pictures (`list[dict]`): Of the report.
        method (`str`): The method.
        metric (`str`): A name of `METRICS`.
        count (`int`): Pictures in a group, fewer where there are not enough.
    """
    order = sorted(pictures, key=lambda picture: picture["scores"][method][metric], reverse="↑" in METRICS[metric])
    count = min(count, max(1, len(order) // 3))
    first = max(0, (len(order) - count + 1) // 2)
    groups = {"Best": order[:count], "Median": order[first : first + count], "Worst": order[-count:]}
    return groups if len(order) >= 3 else {"All": order}


def data_url(path: Path) -> str:
    try:
        with Image.open(path) as image:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=90)
    except FileNotFoundError:
        raise ValueError(f"There is no picture {path}: `quality.py` keeps pictures with `--output`.") from None
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery_html(report: dict, folder: Path, metric: str, count: int) -> str:
    """
    Writes the page.

    Args:
        report (`dict`): `report.json` of `quality.py`.
        folder (`Path`): Its folder of pictures.
        metric (`str`): A name of `METRICS`.
        count (`int`): Pictures of each kind.

    Raises:
        ValueError: If the metric was not measured, or a picture is missing.
    """
    means = report["means"]["all"]["scores"]
    measured = report["pictures"][0]["scores"]
    if any(metric not in scores for scores in measured.values()):
        raise ValueError(f"`--metric` must be one that was measured for each picture, but is {metric!r}.")
    form = FORMATS.get(metric, "{:.2f}")
    parts = []
    for method, scores in means.items():
        parts.append(f"<h2>{html.escape(method)}: {METRICS[metric]} {form.format(scores[metric])}</h2>")
        for title, group in ranked(report["pictures"], method, metric, count).items():
            parts.append(f'<h3>{title}</h3>\n<div class="row">')
            for picture in group:
                photo, hole, result = (
                    data_url(picture_path(folder, name, picture["name"])) for name in ("photo", "input", method)
                )
                parts.append(
                    FIGURE.format(
                        photo=photo,
                        hole=hole,
                        result=result,
                        method=html.escape(method),
                        name=html.escape(picture["name"]),
                        mask=f"hole of {100 * picture['mask_area']:.0f} %",
                        score=form.format(picture["scores"][method][metric]),
                    )
                )
            parts.append("</div>")
    title = f"Best, median and worst by {METRICS[metric]}"
    note = (
        f"{len(report['pictures'])} pictures ({html.escape(report['protocol'])}). Left of the line is what a method "
        "filled, right of it the photo: drag, or use the arrow keys."
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" '
        f'content="width=device-width">\n<title>{title}</title>\n<style>{STYLE}</style>\n<h1>{title}</h1>\n<p>{note}'
        "</p>\n" + "\n".join(parts) + "\n</html>\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, help="folder that quality.py was given as --results")
    add("-o", "--output", type=Path, default="gallery.html", help="the page to be written")
    add("--pictures", type=Path, help="folder that it was given as --output; default: as the report says")
    add("--metric", choices=[name for name in METRICS if name != "fid"], default="lpips_hole")
    add("--count", type=int, default=3, help="pictures of each kind")
    args = parser.parse_args(arguments)
    if args.count < 1:
        parser.error(f"`--count` must be at least 1, but is {args.count}")
    file = args.results / "report.json"
    if not file.is_file():
        raise ValueError(f"`results` must be a folder with a report, but there is no {file}.")
    report = json.loads(file.read_text())
    pictures = args.pictures or report["settings"]["output"]
    if pictures is None:
        raise ValueError("The run kept no pictures: give `quality.py` an `--output`.")
    args.output.write_text(gallery_html(report, Path(pictures), args.metric, args.count), encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"gallery.py: {error}")
