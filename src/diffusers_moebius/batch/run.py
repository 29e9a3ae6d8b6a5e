"""The run over many photos: reading ahead and writing behind in threads while the model works."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .photo import Item, MaskOptions, Photo, fill_photos, read_photo
from .sinks import FileSink, ShardSink

if TYPE_CHECKING:
    from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

# So many photos are read, and checked, before the model is loaded.
READ_AHEAD = 4
_THREADS = min(8, os.cpu_count() or 1)
# Photos that are held in memory, read ahead with the one at hand or waiting to be written, have at most so many pixels
# of each kind; but one is always read ahead, and one written.
PIXELS_AT_ONCE = 2**25
# At 512 px in float16, with room to spare; a batch that does not fit is done one by one.
_BYTES_A_PHOTO = 3 * 2**30


class Outcome(NamedTuple):
    """
    What became of a photo.

    Args:
        item (`Item`): The photo.
        paths (`list[Path]`): Files that are complete by now.
        remarks (`list[str]`): What its owner may not have meant, in words.
        seconds (`float`): Time for reading, its share of filling, and writing.
        error (`Exception`, *optional*): Why it is not done.
    """

    item: Item
    paths: list[Path] = []
    remarks: list[str] = []
    seconds: float = 0.0
    error: Exception | None = None


def inpaint_items(
    items: Iterable[Item],
    sink: FileSink | ShardSink,
    load_pipeline: Callable[[], "MoebiusInpaintPipeline"],
    masks: MaskOptions,
    options: dict[str, Any],
    seed: int = 0,
    batch_size: int | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """
    Fills photos. A photo's result does not depend on which others there are, but for rounding.

    Args:
        items (`Iterable[Item]`): The photos.
        sink (`FileSink` or `ShardSink`): Where results go.
        load_pipeline (`Callable`): Returns the pipeline; called once a photo has been read and the first few have been
            looked at.
        masks (`MaskOptions`): How masks are read.
        options (`dict`): What the pipeline's call takes besides pictures, masks and generators.
        seed (`int`, defaults to 0): Seed of each photo.
        batch_size (`int`, *optional*): Photos of one working size that run together; by default one on a processor,
            and on a GPU what its free memory suggests.
        is_stopped (`Callable`): When it says so, nothing new is begun; what is filled is still written.

    Yields:
        `Outcome`: One a photo, errors of the first few before all else.
    """
    pipeline = None
    waiting: dict[tuple[int, int], list[tuple[Photo, float]]] = {}
    writes: deque[tuple[Photo, float, Future]] = deque()

    def read(item: Item) -> tuple[Photo, float]:
        started = time.perf_counter()
        photo = read_photo(item, masks)
        photo.remarks.extend(sink.check(photo))
        return photo, time.perf_counter() - started

    def write(photo: Photo, result: Any) -> tuple[list[Path], float]:
        started = time.perf_counter()
        return sink.write(photo, result), time.perf_counter() - started

    def fill(batch: list[tuple[Photo, float]]) -> Iterator[Outcome]:
        started = time.perf_counter()
        results = fill_photos(pipeline, [photo for photo, _ in batch], seed, options)
        share = (time.perf_counter() - started) / len(batch)
        for (photo, seconds), result in zip(batch, results):
            if isinstance(result, Exception):
                yield Outcome(photo.item, [], photo.remarks, seconds + share, result)
            else:
                writes.append((photo, seconds + share, writers.submit(write, photo, result)))
        while len(writes) > _THREADS or (writes and writes[0][2].done()) or (len(writes) > 1 and is_full(writes)):
            yield finished(*writes.popleft())

    def is_full(photos: Iterable[tuple[Photo, float, Future]]) -> bool:
        return sum(_pixels(photo) for photo, _, _ in photos) > PIXELS_AT_ONCE

    def finished(photo: Photo, seconds: float, future: Future) -> Outcome:
        error = future.exception()
        if error is not None:
            return Outcome(photo.item, [], photo.remarks, seconds, _expected(error))
        paths, writing = future.result()
        return Outcome(photo.item, paths, photo.remarks, seconds + writing)

    readers, writers = ThreadPoolExecutor(_THREADS), ThreadPoolExecutor(_THREADS)
    try:
        for item, future in _read_ahead(iter(items), read, readers, max(READ_AHEAD, 2 * (batch_size or 1))):
            if is_stopped():
                break
            if future.exception() is not None:
                yield Outcome(item, error=_expected(future.exception()))
                continue
            if pipeline is None:
                from ..pictures.region import find_region  # brings torch

                pipeline = load_pipeline()
                batch_size = batch_size or _suggest_batch_size(pipeline)
            photo, seconds = future.result()
            try:
                size = find_region(photo.image, photo.mask, pipeline.sizes, options.get("padding_mask_crop")).size
            except ValueError as error:
                yield Outcome(item, [], photo.remarks, seconds, ValueError(f"{item.name}: {error}"))
                continue
            waiting.setdefault(size, []).append((photo, seconds))
            if len(waiting[size]) == batch_size:
                yield from fill(waiting.pop(size))
            elif sum(map(len, waiting.values())) == 4 * batch_size:  # so many sizes that memory would run full
                yield from fill(waiting.pop(max(waiting, key=lambda size: len(waiting[size]))))
        while waiting and not is_stopped():
            yield from fill(waiting.popitem()[1])
        while writes:
            yield finished(*writes.popleft())
    finally:
        readers.shutdown(cancel_futures=True)
        writers.shutdown()


def _read_ahead(
    items: Iterator[Item], read: Callable[[Item], Any], readers: Executor, window: int
) -> Iterator[tuple[Item, Future]]:
    def ahead(future: Future) -> int:
        """How many may be read besides one, if they are about as large."""
        if future.exception() is not None:
            return window
        return min(window, max(1, PIXELS_AT_ONCE // _pixels(future.result()[0]) - 1))

    first = []
    for item in islice(items, window):
        first.append((item, readers.submit(read, item)))
        if len(first) > ahead(first[-1][1]):
            break
    reads = deque(sorted(first, key=lambda entry: entry[1].exception() is None))
    while reads:
        item, future = reads.popleft()
        missing = max(0, ahead(future) - len(reads))
        reads.extend((each, readers.submit(read, each)) for each in islice(items, missing))
        yield item, future


def _pixels(photo: Photo) -> int:
    return photo.image.width * photo.image.height


def _expected(error: BaseException) -> Exception:
    """The error, if it is one that a photo can cause."""
    if isinstance(error, (ValueError, OSError)):
        return error
    raise error


def _suggest_batch_size(pipeline: "MoebiusInpaintPipeline") -> int:
    import torch

    if pipeline.device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(pipeline.device)
    return max(1, min(16, free // _BYTES_A_PHOTO))
