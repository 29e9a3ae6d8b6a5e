"""Texture from the photo itself: a hole is filled with patches of what surrounds it, led by the model's filling."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..linear import linear
from .mask import grow, mask_box
from .paste import match_edges, membrane
from .region import Region, fill_hole, resize

DETAIL_MODES = ("patches", "enlarged", None)
# Patches keep so many pixels away from a hole: what is left of an object beside its mask is not to be copied.
RIM = 4
# Share of its surroundings from which on a hole is so large that they do not say what belongs into it.
LARGE = 0.2
# Mean squared error of a held-out ring above which patches are of no use. On twelve removals, those that nobody would
# keep (a shuttle, a cup, a face) had 0.031 to 0.075, all others at most 0.023.
STRANGE = 0.03
# Weight of a filling that leads, and of one that only says where to start.
LED, UNLED = 0.5, 0.02
# Share of the guide in the result: it is less wrong where patches are wrong, and too little to be seen elsewhere.
SMOOTH = 0.08


class Settings(NamedTuple):
    """
    How patches are compared and put together; distances are in units of the picture's own.

    Args:
        radius (`int`): A patch has `2 * radius + 1` pixels a side.
        components (`int`): Principal components by which patches are compared.
        texture (`float`): Weight of the channels that say how rough the picture is; with 0 there are none.
        position (`tuple[float, float]`): How far a patch may come from below or above, and from the side: weight of
            the distance in parts of the region's size, times the region's contrast.
        lead_sigma (`float`): What counts as the low frequencies of a filling that leads, in pixels.
        thin (`int`): A scale at which no pixel of the hole is farther from its edge is coarse enough.
        iterations (`tuple[int, int]`): Rounds of search and vote at the finest and at the coarsest scale.
        exact (`int`): So many pairs of patches are compared one and all; where there are more, the search is random.
        search_pixels (`int`): Regions with more pixels are searched at half their size.
        mean (`float`): Weight of the patches' mean colours, which may be corrected, against their other components.
        shift (`float`): By how much a patch's mean colour is corrected at most, at the two finest scales.
        gamma (`float`): By how much a patch counts less for each pixel that it lies farther inside the hole.
        around (`float`): How far from a pixel, at full size, the guide's first three channels are compared as well, in
            eight directions; with 0 only at the pixel itself.
        spread (`float`): In voting a patch counts `exp(-distance / spread)`, in units of the upper quartile of all
            distances.
    """

    radius: int = 3
    components: int = 24
    texture: float = 6.0
    position: tuple[float, float] = (1.0, 0.5)
    lead_sigma: float = 8.0
    thin: int = 5
    iterations: tuple[int, int] = (4, 8)
    exact: int = 200_000_000
    search_pixels: int = 800_000
    mean: float = 0.1
    shift: float = 0.05
    gamma: float = 3.0
    spread: float = 13.0
    around: float = 0.0


# Of what enlarging takes away: there are no colours to correct, and where a thing lies hardly matters.
ENLARGED = Settings(texture=0.0, position=(0.1, 0.1), iterations=(4, 6), mean=1.0, shift=0.0)


def _shrink(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    """Leaves pixels whose whole neighbourhood is in the mask and in the picture."""
    return ~grow(F.pad(~mask, (pixels,) * 4, value=True), pixels)[pixels:-pixels, pixels:-pixels]


def _box(mask: torch.Tensor, margin: int = 0) -> tuple[slice, slice]:
    """The rows and the columns of a mask that is not empty, and a margin."""
    lines = [mask.any(1 - dim).nonzero()[:, 0] for dim in (0, 1)]
    return tuple(slice(max(line[0].item() - margin, 0), line[-1].item() + 1 + margin) for line in lines)


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of `[C, H, W]`."""
    if sigma < 0.3:
        return image
    reach = math.ceil(2.5 * sigma)
    x = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.softmax(-x.square() / (2 * sigma**2), 0).tolist()
    for dim, border in ((2, (reach, reach, 0, 0)), (1, (0, 0, reach, reach))):
        padded, image = F.pad(image, border, mode="replicate"), torch.zeros_like(image)
        for start, weight in enumerate(kernel):  # an eighth of what a convolution of single channels takes
            image.add_(padded.narrow(dim, start, image.shape[dim]), alpha=weight)
    return image


def _halve(image: torch.Tensor) -> torch.Tensor:
    """Halves `[C, H, W]`; odd sizes are continued by a pixel."""
    height, width = image.shape[1:]
    return F.avg_pool2d(F.pad(image[None], (0, width % 2, 0, height % 2), mode="replicate"), 2)[0]


def _roughness(image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """
    Mean absolute gradients of the known pixels around each pixel, `[2, H, W]`.

    Where they are unknown they are filled like colours, so that a rough surface does not become a smooth one at
    coarse scales, where both look alike (Newson et al., "Video Inpainting of Complex Scenes", 2014, section 3.3).
    """
    grey = F.pad(image.mean(0)[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    gradients = torch.stack([grey[1:-1, 2:] - grey[1:-1, :-2], grey[2:, 1:-1] - grey[:-2, 1:-1]]).abs() / 2
    known = (~grow(~known, 1)).float()[None]
    sums = F.avg_pool2d(torch.cat([gradients * known, known])[None], 5, 1, 2)[0]
    return sums[:2] / sums[2:].clamp(min=1e-6)


class _Scale:
    """
    One scale of the pyramid: where the hole's patches are copied from.

    Rows are gathered by `index_select`, since indexing in brackets takes several times as long on a CPU.

    Args:
        image (`torch.Tensor` of shape `[C, H, W]`): Colours, and roughness if it counts; what is in the hole is not
            looked at.
        hole (`torch.Tensor` of shape `[H, W]`): Boolean.
        source (`torch.Tensor` of shape `[H, W]`): Pixels that may be copied.
        guide (`torch.Tensor` of shape `[K, H, W]`): What else is to be matched in its place, already weighted.
    """

    def __init__(self, image, hole, source, guide, settings, generator):
        self.settings, self.generator = settings, generator
        radius = settings.radius
        self.image, self.hole = image.masked_fill(hole, 0), hole
        self.height, self.width = hole.shape
        self.valid = _shrink(source & ~hole, radius).flatten()
        self.sources = self.valid.nonzero()[:, 0]
        is_query = grow(hole, radius)
        self.queries = is_query.flatten().nonzero()[:, 0]
        self.is_exact = len(self.queries) * len(self.sources) <= settings.exact
        self.index = torch.full_like(is_query.flatten(), -1, dtype=torch.long)  # of each position among the queries
        self.index[self.queries] = torch.arange(len(self.queries), device=hole.device)
        self.box = _box(is_query)
        self.places = is_query[self.box].flatten().nonzero()[:, 0]  # of the queries in their box
        self.match = self.random_sources(len(self.queries))
        self.distance = torch.zeros(len(self.queries), device=hole.device)
        self.shift = torch.zeros(len(self.queries), 3, device=hole.device)
        self.trust = settings.gamma ** -self._depth(is_query)
        self.guide, self.contrast = guide, image[:3, ~hole].std(1).mean()

    def random_sources(self, count: int) -> torch.Tensor:
        index = torch.randint(len(self.sources), (count,), generator=self.generator)
        return self.sources.index_select(0, index.to(self.sources.device))

    def _depth(self, is_query: torch.Tensor) -> torch.Tensor:
        inner = is_query[_box(is_query, 1)]
        depth = torch.zeros(inner.shape, device=inner.device)
        place = inner.flatten().nonzero()[:, 0]
        for _ in range(24):
            depth += inner
            inner = ~grow(~inner, 1)
        return depth.flatten().index_select(0, place)

    def prepare(self) -> None:
        """Finds the principal components of the patches, and the features of those that may be copied."""
        radius, side, shape = self.settings.radius, 2 * self.settings.radius + 1, self.hole.shape
        steps = torch.arange(-radius, radius + 1, device=self.hole.device)
        offsets = (steps[:, None] * self.width + steps).flatten()
        places = (self.random_sources(4096)[:, None] + offsets).clamp(0, self.height * self.width - 1)
        patches = self._pixels().index_select(0, places.flatten()).view(len(places), side * side, -1).transpose(1, 2)
        patches[:, :3] -= patches[:, :3].mean(2, keepdim=True)
        patches = patches.flatten(1)
        patches = (patches - patches.mean(0)).T.contiguous()
        _, vectors = torch.linalg.eigh(linear(patches, patches).cpu().double())  # not all devices have it
        means = torch.zeros(3, len(self.image), side * side)
        self.mean_weight = side * math.sqrt(self.settings.mean)
        means[range(3), range(3)] = self.mean_weight / side**2
        basis = vectors[:, -self.settings.components :].flip(1).T.float()  # the first components vary most
        basis = torch.cat([means, basis.view(-1, len(self.image), side * side)]).to(patches.device)
        self.basis = basis.unflatten(2, (side, side)).contiguous(memory_format=torch.channels_last)
        position = [
            side * self.contrast * weight * torch.arange(length, device=self.hole.device) / max(shape)
            for weight, length in zip(self.settings.position, shape)
        ]
        guide = self.guide
        if self.settings.around:
            step = max(1, round(self.settings.around))
            padded = F.pad(guide[None, :3], (step,) * 4, mode="replicate")[0]
            steps = [slice(start, start - 2 * step or None) for start in (0, step, 2 * step)]
            guide = torch.cat([*(padded[:, rows, columns] for rows in steps for columns in steps), guide[3:]])
        self.extra = torch.cat([side * guide, torch.stack(torch.meshgrid(position, indexing="ij"))])
        self.extra = self.extra.permute(1, 2, 0)
        self.source_features = self.features(self.image, (slice(0, self.height), slice(0, self.width)))
        self.first_source_features = self.source_features[:, :8].contiguous()
        if self.is_exact:
            table = self.source_features.index_select(0, self.sources)
            self.center = table.mean(0)  # around zero the products are exact enough for a close call
            table = table - self.center
            # A product with (query, 1) is the squared distance but for the query's own square.
            table = torch.cat([-2 * table, table.square().sum(1, keepdim=True)], 1)
            self.table = F.pad(table, (0, 0, 0, -len(table) % 64))
            self.table[len(table) :, -1] = math.inf

    def _pixels(self) -> torch.Tensor:
        return self.image.flatten(1).T.contiguous()

    def features(self, image: torch.Tensor, box: tuple[slice, slice]) -> torch.Tensor:
        """
        What the patches around the pixels of a box are compared by, `[h * w, features]`.

        Mean colours, weighted, come first, then the components, those that vary most before others.
        """
        rows, columns = (slice(side.start, side.stop + 2 * self.settings.radius) for side in box)
        padded = F.pad(image[None], (self.settings.radius,) * 4, mode="replicate")[..., rows, columns]
        components = F.conv2d(padded.contiguous(memory_format=torch.channels_last), self.basis)
        return torch.cat([components[0].permute(1, 2, 0), self.extra[box]], 2).flatten(0, 1)

    def search(self, estimate: torch.Tensor) -> None:
        """Finds for each patch of the estimate that touches the hole one like it outside."""
        query_features = self.features(estimate, self.box).index_select(0, self.places)
        if self.is_exact:
            self._compare_all(query_features)
        difference = query_features - self.source_features.index_select(0, self.match)
        self.distance = difference.square().sum(1)
        if not self.is_exact:
            # By the first of their features most candidates turn out to be farther already.
            pairs = [
                (query_features[:, :8].contiguous(), self.first_source_features),
                (query_features, self.source_features),
            ]
            for _ in range(2):
                self._propagate(pairs)
                self._draw(pairs)
            difference = query_features - self.source_features.index_select(0, self.match)
        self.shift = (difference[:, :3] / self.mean_weight).clamp(-self.settings.shift, self.settings.shift)

    def _compare_all(self, query_features: torch.Tensor) -> None:
        query_features = F.pad(query_features - self.center, (0, 1), value=1)
        nearest = []
        for part in query_features.split(max(1, 2**20 // len(self.table))):  # which stay in the cache
            groups = linear(part, self.table).unflatten(1, (-1, 64))
            group = groups.amin(2).argmin(1)  # sooner than the least of all at once
            inside = groups[torch.arange(len(part), device=part.device), group].argmin(1)
            nearest.append(64 * group + inside)
        self.match = self.sources.index_select(0, torch.cat(nearest))

    def _propagate(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Tries what the neighbours copy, shifted (Barnes et al., "PatchMatch", 2009, section 3.2, all at once)."""
        for delta in (1, -1, self.width, -self.width):
            neighbour = self.index.index_select(0, (self.queries + delta).clamp(0, len(self.index) - 1))
            candidate = self.match.index_select(0, neighbour.clamp(min=0)) - delta
            self._improve(pairs, torch.where(neighbour < 0, self.match, candidate))

    def _draw(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Tries random places around the match, ever closer to it (the same, section 3.2)."""
        reach = max(self.height, self.width) / 2
        while reach >= 1:
            draw = torch.rand(2, len(self.queries), generator=self.generator).to(self.match.device)
            rows, columns = (reach * (2 * draw - 1)).round().long()
            rows = (self.match // self.width + rows).clamp(0, self.height - 1)
            columns = (self.match % self.width + columns).clamp(0, self.width - 1)
            self._improve(pairs, rows * self.width + columns)
            reach *= 0.35

    def _improve(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], candidate: torch.Tensor) -> None:
        candidate = candidate.clamp(0, self.height * self.width - 1)
        rows = ((candidate != self.match) & self.valid.index_select(0, candidate)).nonzero()[:, 0]
        candidate = candidate.index_select(0, rows)
        for queries, sources in pairs:
            distance = (queries.index_select(0, rows) - sources.index_select(0, candidate)).square().sum(1)
            better = (distance < self.distance.index_select(0, rows)).nonzero()[:, 0]
            rows, candidate = rows.index_select(0, better), candidate.index_select(0, better)
        self.match[rows], self.distance[rows] = candidate, distance.index_select(0, better)

    def vote(self, copy: bool = False) -> torch.Tensor:
        """
        The picture with its hole filled by the mean of all patches over each pixel, weighted by how well they fit.

        Wexler et al., "Space-Time Completion of Video", 2007, section 3.2. With `copy` the one that fits best is
        taken instead: seams may show, but nothing is blurred.
        """
        quartile = torch.quantile(self.distance[:: len(self.distance) // 10_000 + 1], 0.75)
        weights = torch.exp(-self.distance / (self.settings.spread * quartile.clamp(min=1e-8))) * self.trust + 1e-12
        weights, shift = self._spread(weights[:, None]), self._spread(self.shift)
        match = self._spread(self.match[:, None], self.sources[0].item())[..., 0]
        colors, (height, width) = self._pixels(), self.hole[self.box].shape
        total = torch.zeros(height, width, len(self.image), device=match.device)
        best = total[..., :1]
        radius = self.settings.radius
        for down in range(-radius, radius + 1):
            for right in range(-radius, radius + 1):
                query = slice(radius - down, radius - down + height), slice(radius - right, radius - right + width)
                place = match[query] + (down * self.width + right)
                votes = colors.index_select(0, place.flatten()).view(total.shape)
                if copy:
                    votes[..., :3] += shift[query]
                    better = weights[query] > best
                    best, total = torch.where(better, weights[query], best), torch.where(better, votes, total)
                else:
                    total.addcmul_(votes, weights[query])
        if not copy:
            # Of weights and shifts the sums over a window, which take no gathering.
            sums, side = torch.cat([weights * shift, weights], 2).permute(2, 0, 1), 2 * radius + 1
            own = sums[:, radius:-radius, radius:-radius]
            sums = side**2 * F.avg_pool2d(F.avg_pool2d(sums, (side, 1), 1), (1, side), 1)
            # Instead of patches around places outside the picture a pixel's own counts once more.
            across, down = (self._reach(dim) for dim in (1, 0))
            missing = side**2 - down[:, None] * across
            sums = (sums + missing * own).permute(1, 2, 0)
            own = colors.index_select(0, match[radius:-radius, radius:-radius].flatten()).view(total.shape)
            total.addcmul_(own, missing[..., None] * weights[radius:-radius, radius:-radius])
            total[..., :3] += sums[..., :3]
            total /= sums[..., 3:]
        result, hole = self.image.clone(), self.hole[self.box]
        result[(slice(None), *self.box)][:, hole] = total[hole].T
        return result

    def _reach(self, dim: int) -> torch.Tensor:
        """Over how many positions of the picture patches lie that cover a pixel, for the lines of the queries' box."""
        radius, length = self.settings.radius, self.hole.shape[dim]
        lines = torch.arange(self.box[dim].start, self.box[dim].stop, device=self.hole.device)
        return (lines + radius).clamp(max=length - 1) - (lines - radius).clamp(min=0) + 1

    def _spread(self, values: torch.Tensor, default: float = 0) -> torch.Tensor:
        """What belongs to the queries in their places, in their box with a border of a patch's radius."""
        shape = self.hole[self.box].shape
        box = values.new_full((shape.numel(), values.shape[1]), default).index_copy_(0, self.places, values)
        return F.pad(box.view(*shape, -1), (0, 0, *(self.settings.radius,) * 4), value=default)

    def adopt(self, coarse: "_Scale") -> None:
        """Takes over the matches of the next coarser scale."""
        rows, columns = self.queries // self.width, self.queries % self.width
        place = coarse.index[rows // 2 * coarse.width + columns // 2]
        match = coarse.match[place]
        rows = (2 * (match // coarse.width) + rows % 2).clamp(0, self.height - 1)
        columns = (2 * (match % coarse.width) + columns % 2).clamp(0, self.width - 1)
        candidate = rows * self.width + columns
        known = place >= 0
        self.match = torch.where(known & self.valid[candidate], candidate, self.match)
        self.distance, self.shift = coarse.distance[place] * known, coarse.shift[place] * known[:, None]


@torch.no_grad()
def fill_with_patches(
    image: torch.Tensor,
    hole: torch.Tensor,
    source: torch.Tensor,
    guide: torch.Tensor,
    lead: float | torch.Tensor = UNLED,
    generator: torch.Generator | None = None,
    settings: Settings = Settings(),
    copy: bool = False,
) -> torch.Tensor:
    """
    Fills a hole with patches of the picture around it, from coarse to fine.

    Args:
        image (`torch.Tensor` of shape `[3, H, W]`): Colours in [0, 1]; what is in the hole is not looked at.
        hole (`torch.Tensor` of shape `[H, W]`): Boolean, `True` is filled.
        source (`torch.Tensor` of shape `[H, W]`): Boolean, the pixels that may be copied; at least one whole patch.
        guide (`torch.Tensor` of shape `[3, H, W]`): A filling to start from.
        lead (`float` or `torch.Tensor` of shape `[K, H, W]`, defaults to 0.02): Weight of the guide's low frequencies
            against the patches' own colours, or what is to be matched instead of them, already weighted.
        generator (`torch.Generator`, *optional*): Source of the random search, on the CPU.
        settings (`Settings`): How patches are compared and put together.
        copy (`bool`, defaults to `False`): Whether the result is copied pixel by pixel instead of averaged.

    Returns:
        `torch.Tensor` of shape `[3, H, W]`, equal to `image` outside the hole.
    """
    guide = torch.where(hole, guide, image)
    low = lead if torch.is_tensor(lead) else math.sqrt(lead) * _blur(guide, settings.lead_sigma)
    if settings.texture:
        image = torch.cat([image, settings.texture * _roughness(image, ~hole)])
    levels = [(image, hole, source, guide, low)]
    while _is_divisible(*levels[-1][1:3], settings):
        image_, hole_, source_, guide_, low_ = levels[-1]
        known = (~hole_).float()[None]
        share = _halve(known)
        small = _halve(image_ * known) / share.clamp(min=1e-6)
        levels.append((small, share[0] < 0.6, _halve(source_.float()[None])[0] >= 0.6, _halve(guide_), _halve(low_)))

    scale = None
    for level, (image_, hole_, source_, guide_, low_) in reversed(list(enumerate(levels))):
        coarse = scale
        # Coarse scales decide what stands where, so that their colours are taken as they are.
        local = settings._replace(around=settings.around / 2**level)
        local = local if level < 2 else local._replace(mean=1.0, shift=0.0)
        scale = _Scale(image_, hole_, source_, low_, local, generator)
        estimate = None
        if coarse is None:
            estimate = fill_hole(scale.image[None], hole_[None, None].float())[0]
            estimate[:3] = guide_
        else:
            scale.adopt(coarse)
            del coarse
            if hole_.numel() > settings.search_pixels:
                continue
        scale.prepare()
        fine, most = settings.iterations
        for _ in range(round(fine + (most - fine) * level / max(len(levels) - 1, 1))):
            scale.search(scale.vote() if estimate is None else estimate)
            estimate = None
    return scale.vote(copy)[:3]


def _is_divisible(hole: torch.Tensor, source: torch.Tensor, settings: Settings) -> bool:
    """Whether the next coarser scale is of use: the hole is thick, and enough is left around it."""
    is_thin = not (~grow(~hole, settings.thin)).any()
    if min(hole.shape) < 48 or (is_thin and hole.numel() <= settings.search_pixels):
        return False
    small = _halve((~hole & source).float()[None])[0] >= 0.6
    queries = grow(~small, settings.radius).sum()
    return bool(_shrink(small, settings.radius).sum() >= max(256, queries // 2))


def holes(mask: np.ndarray, reach: int) -> list[tuple[tuple[int, int, int, int], np.ndarray]]:
    """
    Takes a mask apart into holes that are farther from each other than about `reach` pixels.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean, not empty.
        reach (`int`): At least 1.

    Returns:
        `list[tuple[tuple[int, int, int, int], np.ndarray]]`: Of each hole the box `(left, top, right, bottom)` and a
        boolean mask `[h, w]` of it.
    """
    left, top, right, bottom = mask_box(mask)
    left, top = left // reach * reach, top // reach * reach
    mask = mask[top:bottom, left:right]
    blocks = F.pad(torch.from_numpy(mask), (0, (left - right) % reach, 0, (top - bottom) % reach))
    blocks = blocks.unflatten(0, (-1, reach)).any(1).unflatten(1, (-1, reach)).any(2)
    labels = torch.arange(1, blocks.numel() + 1, dtype=torch.float64).view(blocks.shape) * blocks
    while True:  # the greatest label spreads over all blocks that touch
        spread = F.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * blocks
        if (spread == labels).all():
            break
        labels = spread
    found = []
    for label in labels[blocks].unique():
        own = (labels == label).numpy()
        area = mask_box(own)
        own = own[_slices(area)].repeat(reach, 0).repeat(reach, 1)
        part = mask[area[1] * reach : area[3] * reach, area[0] * reach : area[2] * reach]
        part = part & own[: part.shape[0], : part.shape[1]]
        inner = mask_box(part)
        x, y = left + area[0] * reach, top + area[1] * reach
        found.append(((x + inner[0], y + inner[1], x + inner[2], y + inner[3]), part[_slices(inner)]))
    return found


def held_out_errors(
    image: torch.Tensor, hole: torch.Tensor, source: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """
    How well what is known around a hole is rebuilt when it is held out: a ring of 6 px, at a size of 128 px.

    Args:
        image (`torch.Tensor` of shape `[3, H, W]`): Colours in [0, 1]; what is in the hole is not looked at.
        hole (`torch.Tensor` of shape `[H, W]`): Boolean.
        source (`torch.Tensor` of shape `[H, W]`): Boolean, the pixels that may be copied.
        generator (`torch.Generator`, *optional*): Source of the random search, on the CPU.

    Returns:
        `tuple[float, float]`: Mean squared errors of patches, infinite if nothing is left to copy from, and of a
        smooth filling.
    """
    while max(hole.shape) > 128:
        known = (~hole).float()[None]
        share = _halve(known)
        image = _halve(image * known) / share.clamp(min=1e-6)
        hole, source = share[0] < 0.6, _halve(source.float()[None])[0] >= 0.6
    held_out = grow(hole, 6)
    ring = held_out & ~hole
    if (ring & source).any():  # not what is left of an object beside its mask
        ring = ring & source
    smooth = fill_hole(image[None], held_out[None, None].float())[0]
    smooth_error = (smooth - image)[:, ring].square().mean().item()
    if not _shrink(source & ~held_out, Settings().radius).any():
        return math.inf, smooth_error
    filled = fill_with_patches(image, held_out, source & ~held_out, smooth, UNLED, generator)
    return (filled - image)[:, ring].square().mean().item(), smooth_error


def add_detail(
    fill: np.ndarray,
    region: Region,
    detail: str | None = "patches",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """
    Gives a filling the texture of its photo, by patches of what surrounds each hole.

    Args:
        fill (`np.ndarray` of shape `[h, w, 3]`): The model's filling of the region's box, floats in [0, 1].
        region (`Region`): The photo, its mask, the box, and the size at which the model worked.
        detail (`str`, *optional*, defaults to `"patches"`): `"patches"` decides for each hole how much the filling
            leads; `"enlarged"` is led by the filling, keeps its low frequencies and replaces what is missing where it
            was enlarged, and does nothing where it was not; `None` does nothing.
        generator (`torch.Generator`, *optional*): Makes the search reproducible; one number is drawn from it.
        device (`torch.device`, defaults to the CPU): Where to compute.

    Returns:
        `np.ndarray` of shape `[h, w, 3]`, in [0, 1]: the photo with its mask filled, or `fill` itself where nothing
        was to be done.

    Raises:
        ValueError: If `detail` is none of these.
    """
    if detail not in DETAIL_MODES:
        raise ValueError(f"`detail` must be one of {', '.join(map(repr, DETAIL_MODES))}, but is {detail!r}.")
    picture, mask, box = region.picture, region.mask, region.box
    if detail is None or not mask.any() or mask.all() or (detail == "enlarged" and region.enlargement <= 1):
        return fill
    where = "cpu" if generator is None else generator.device
    seed = torch.randint(2**31, (1,), generator=generator, device=where).item()
    generator = torch.Generator().manual_seed(seed)
    part = _overlap(mask_box(mask, 1), box)
    inside = mask[_slices(part)]
    led = match_edges(fill[_slices(part, box)], picture.rgb(part), inside).clip(0, 1)
    # Outside the mask it becomes the photo, so that a paste that matches colours finds that they match already.
    result = np.array(picture.rgb(box), np.float32)
    for own, hole in holes(mask, max(16, max(mask.shape) // 64)):
        around = _surroundings(own, mask.shape)
        filled = np.array(picture.rgb(around), np.float32)
        hole_around = np.zeros(filled.shape[:2], bool)
        hole_around[_slices(own, around)] = hole
        both = _overlap(around, part)
        in_around, in_part = _slices(both, around), _slices(both, part)
        filled[in_around][inside[in_part]] = led[in_part][inside[in_part]]
        detailed = _detail_hole(
            torch.from_numpy(filled).permute(2, 0, 1).contiguous().to(device),
            torch.from_numpy(hole_around).to(device),
            torch.from_numpy(mask[_slices(around)]).to(device),
            region.enlargement if detail == "enlarged" else None,
            generator,
        )
        detailed = detailed.permute(1, 2, 0).cpu().numpy().clip(0, 1)
        here = hole_around[in_around]
        result[_slices(both, box)][here] = detailed[in_around][here]
    return result


def _surroundings(hole: tuple[int, int, int, int], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box that patches for a hole come from: as wide as the hole's on each side, within limits."""
    left, top, right, bottom = hole
    side = max(right - left, bottom - top)
    margin = min(max(side, 96), max(side // 4, 256))
    return _overlap((left - margin, top - margin, right + margin, bottom + margin), (0, 0, shape[1], shape[0]))


def _overlap(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3])


def _slices(part: tuple[int, int, int, int], box: tuple[int, int, int, int] = (0, 0, 0, 0)) -> tuple[slice, slice]:
    """Where a part of a picture lies in a box of it, by default in the whole."""
    return slice(part[1] - box[1], part[3] - box[1]), slice(part[0] - box[0], part[2] - box[0])


def _detail_hole(
    filled: torch.Tensor,
    hole: torch.Tensor,
    unknown: torch.Tensor,
    enlargement: float | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """One hole of a filled picture `[3, H, W]`; without `enlargement` it is decided how much the filling leads."""
    source = next((s for s in (~grow(unknown, RIM), ~unknown) if _shrink(s, Settings().radius).sum() >= 64), None)
    if source is None:  # the hole is all but the whole picture
        return filled
    if enlargement is not None:
        return _sharpen(filled, hole, source, enlargement, generator)
    box = _box(hole, 1)
    inside = (slice(None), *box)  # where differences are; around it they are 0
    lead = choose_lead(filled, hole, source, generator)
    if lead is None:
        return filled
    guide = filled if lead == LED else membrane(filled, hole)
    detailed = fill_with_patches(filled, hole, source, guide, lead, generator)
    # The guide is right about low frequencies where it differs a little: patches drift. Large differences are things.
    low = _blur((guide - detailed)[inside] * hole[box], max(hole.shape) / 64)
    detailed[inside] += hole[box] * low * torch.exp(-low.square().sum(0) / (2 * 0.05**2))
    return torch.lerp(detailed, guide, SMOOTH)


def _sharpen(
    filled: torch.Tensor, hole: torch.Tensor, source: torch.Tensor, enlargement: float, generator: torch.Generator
) -> torch.Tensor:
    """
    Adds what enlarging took away, copied from where the photo, reduced and enlarged as well, looks like the filling.

    Freeman et al., "Example-Based Super-Resolution", 2002, with the photo itself as the example. What is copied grows
    with the root of the contrast of what it is copied to: between as it is, and in proportion.
    """
    height, width = hole.shape
    small = resize(filled[None], *(max(1, round(length / enlargement)) for length in hole.shape))
    soft = torch.where(hole, filled, resize(small, height, width)[0])
    band = soft - _blur(soft, enlargement)
    contrast = (_blur(band.square().mean(0, keepdim=True), 1.5 * enlargement) + 0.03**2) ** 0.25
    missing, band = (filled - soft) / contrast, band / contrast
    band *= math.sqrt(3) * missing[:, ~hole].std() / band.std().clamp(min=1e-6)
    lead, settings = torch.cat([band, soft]), ENLARGED._replace(around=0.7 * enlargement)
    missing = fill_with_patches(missing, hole, source, missing, lead, generator, settings, copy=True)
    return torch.where(hole, filled + (1 - SMOOTH) * contrast * missing, filled)


def _is_thick(hole: torch.Tensor) -> bool:
    """Whether a whole thing fits into a hole: somewhere its edge is farther than a sixteenth of the surroundings."""
    share = hole.float()[None]
    while max(share.shape[1:]) > 128:
        share = _halve(share)
    return bool((~grow(share[0] < 0.5, max(share.shape[1:]) // 16)).any())


def choose_lead(
    image: torch.Tensor, hole: torch.Tensor, source: torch.Tensor, generator: torch.Generator | None = None
) -> float | None:
    """
    How much the model's filling should lead the patches, by what is known of a hole.

    Args:
        image (`torch.Tensor` of shape `[3, H, W]`): Colours in [0, 1]; what is in the hole is not looked at.
        hole (`torch.Tensor` of shape `[H, W]`): Boolean.
        source (`torch.Tensor` of shape `[H, W]`): Boolean, the pixels that may be copied.
        generator (`torch.Generator`, *optional*): Source of the random search, on the CPU.

    Returns:
        `float`, *optional*: A weight for [`fill_with_patches`]; `None` where patches would copy a thing that does not
        belong there, such as half of a face, and the filling is to stay.
    """
    patch_error, smooth_error = held_out_errors(image, hole, source, generator)
    if patch_error > STRANGE and _is_thick(hole):
        return None
    return LED if hole.float().mean() >= LARGE and min(patch_error, smooth_error) > 0.005 else UNLED
