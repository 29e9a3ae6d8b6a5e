"""Random holes in the manner of LaMa: polylines of thick strokes, or boxes, then a dilation."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .mask import dilate_mask


@dataclass(frozen=True)
class MaskPreset:
    """
    Ranges of one family of random masks, in pixels of `resolution`; ranges are inclusive.

    Args:
        resolution (`int`): Picture size that the pixel sizes below are meant for.
        strokes (`tuple[int, int]`): Number of strokes.
        stroke_width (`int`): Largest random part of a stroke's width.
        stroke_length (`int`): Largest random part of a segment's length.
        boxes (`tuple[int, int]`, *optional*): Number of boxes. `None` for strokes only.
        box_side (`tuple[int, int]`): Side of a box.
        box_margin (`int`): Distance that a box keeps from the border.
    """

    resolution: int
    strokes: tuple[int, int]
    stroke_width: int
    stroke_length: int
    boxes: tuple[int, int] | None = None
    box_side: tuple[int, int] = (30, 150)
    box_margin: int = 0


MASK_PRESETS = {
    "medium_512": MaskPreset(512, (4, 10), 100, 200, (1, 5), (30, 150), 0),
    "thick_512": MaskPreset(512, (1, 5), 250, 450, (1, 4), (30, 300), 10),
    "thin_512": MaskPreset(512, (4, 70), 20, 100),
    "thick_256": MaskPreset(256, (1, 5), 100, 200, (1, 3), (30, 150), 10),
}
BOX_ODDS = 0.3  # against 1 for strokes
MAX_TURN = 4.0  # radians between two segments


def random_mask(
    height: int, width: int, preset: str | MaskPreset = "medium_512", generator: np.random.Generator | None = None
) -> np.ndarray:
    """
    Draws one random mask.

    Args:
        height (`int`): Height in pixels, at least 8.
        width (`int`): Width in pixels, at least 8.
        preset (`str` or [`MaskPreset`], defaults to `"medium_512"`): One of `MASK_PRESETS`, or ranges of your own. Its
            pixel sizes are scaled to the shorter side of the mask.
        generator (`np.random.Generator`, *optional*): Source of randomness; equal generators draw equal masks.

    Returns:
        `np.ndarray` of shape `[height, width]` and dtype bool, `True` where the picture is to be filled. Never empty
        and never full.

    Formula: Moebius (arXiv 2606.19195) trains on the masks of LaMa (arXiv 2109.07161, section 2.4).
    """
    if isinstance(preset, str):
        if preset not in MASK_PRESETS:
            raise ValueError(f"`preset` must be one of {sorted(MASK_PRESETS)}, but is {preset!r}.")
        preset = MASK_PRESETS[preset]
    if min(height, width) < 8:
        raise ValueError(f"`height` and `width` must be at least 8, but are {height} and {width}.")
    generator = np.random.default_rng() if generator is None else generator
    scale = min(height, width) / preset.resolution

    def integer(bounds: tuple[int, int]) -> int:
        return int(generator.integers(*bounds, endpoint=True))

    def draw_stroke(draw: ImageDraw.ImageDraw) -> None:
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        angle = generator.uniform(0, 2 * np.pi)
        thickness = max(1.0, scale * (5 + integer((0, preset.stroke_width))))
        points = [(x, y)]
        for _ in range(integer((1, 5))):
            angle += generator.uniform(-MAX_TURN, MAX_TURN)
            length = scale * (10 + integer((0, preset.stroke_length)))
            x = float(np.clip(x + length * np.cos(angle), 0, width))
            y = float(np.clip(y + length * np.sin(angle), 0, height))
            points.append((x, y))
        draw.line(points, fill=255, width=round(thickness))
        radius = thickness / 2
        for x, y in points:  # round joints and ends
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)

    def draw_box(draw: ImageDraw.ImageDraw) -> None:
        margin = round(scale * preset.box_margin)
        sides = [max(1, round(scale * integer(preset.box_side))) for _ in range(2)]
        across, down = (min(side, whole - 2 * margin) for side, whole in zip(sides, (width, height)))
        left, top = integer((margin, width - margin - across)), integer((margin, height - margin - down))
        draw.rectangle((left, top, left + across - 1, top + down - 1), fill=255)

    while True:
        canvas = Image.new("L", (width, height))
        draw = ImageDraw.Draw(canvas)
        if preset.boxes is not None and generator.random() < BOX_ODDS / (1 + BOX_ODDS):
            for _ in range(integer(preset.boxes)):
                draw_box(draw)
        else:
            for _ in range(integer(preset.strokes)):
                draw_stroke(draw)
        # The dilation, by a square once or twice, is in pixels of the preset too.
        radius = round(scale * integer((1, 3)))
        mask = dilate_mask(np.asarray(canvas) > 0, radius * integer((1, 2)))
        if mask.any() and not mask.all():
            return mask
