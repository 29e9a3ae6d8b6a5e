"""WebDataset tar shards as streams, from disk or by URL: read once from front to back, never stored whole."""

import hashlib
import http.client
import io
import logging
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers

from .picture_sources import MASK_SUFFIX, expand_braces, find_shards, is_picture, is_url, shard_category, shard_record

logger = logging.getLogger(__name__)
RETRIES = 5
RETRY_DELAY = 1.0  # seconds before the first retry, doubled with each further one
TIMEOUT = 30.0  # seconds without a byte
# These answers pass with time; others, a missing file or a refused token, do not.
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


class ShardError(Exception):
    """A shard, or the rest of it, that could not be read."""


def resolve_url(url: str) -> tuple[str, dict[str, str]]:
    """
    The address behind a URL, and the headers of a request to it.

    Args:
        url (`str`): `http://`, `https://`, or `hf://[datasets/]owner/name[@revision]/path`.

    Returns:
        `tuple[str, dict[str, str]]`: With the token of the hub for `hf://` alone.
    """
    if not url.startswith("hf://"):
        return url, {}
    parts = url.removeprefix("hf://").split("/")
    repo_type = {"datasets": "dataset", "models": "model", "spaces": "space"}.get(parts[0])
    if repo_type is not None:
        parts = parts[1:]
    if len(parts) < 3:
        raise ValueError(f"A hub URL must be hf://[datasets/]owner/name[@revision]/path, but is {url!r}.")
    name, _, revision = parts[1].partition("@")
    address = hf_hub_url(f"{parts[0]}/{name}", "/".join(parts[2:]), repo_type=repo_type, revision=revision or None)
    return address, build_hf_headers()


class _StrictTarInfo(tarfile.TarInfo):
    """The standard reader takes a broken header behind the first one for the end of the archive, without a word."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(f"broken at byte {archive.offset}: {error}") from error


class ReconnectingStream(io.RawIOBase):
    """
    The bytes of a URL from a position on; after a broken connection it goes on where it broke.

    Args:
        url (`str`): See [`resolve_url`].
        position (`int`, defaults to 0): First byte.

    Raises:
        ShardError: On reading, if the server refuses or the connection broke more than `RETRIES` times without a byte
            in between.
    """

    def __init__(self, url: str, position: int = 0):
        self.url, self.position = url, position
        self.failures = 0
        self.response: http.client.HTTPResponse | None = None
        self.end: int | None = None

    def readable(self) -> bool:
        return True

    def _connect(self) -> None:
        address, headers = resolve_url(self.url)
        request = urllib.request.Request(address)
        for name, value in headers.items():
            # The hub redirects to a storage that has signed the address and refuses a token.
            request.add_unredirected_header(name, value)
        if self.position:
            request.add_header("Range", f"bytes={self.position}-")
        self.response = urllib.request.urlopen(request, timeout=TIMEOUT)
        length = self.response.headers.get("Content-Length")
        start = self.position if self.response.status == 206 else 0
        self.end = start + int(length) if length is not None else None
        left = self.position - start  # a server that knows no ranges begins anew
        while left:
            skipped = len(self.response.read(min(left, 1 << 20)))
            if not skipped:
                raise ConnectionError("the file has become shorter")
            left -= skipped

    def _fail(self, error: Exception) -> None:
        self._disconnect()
        if isinstance(error, urllib.error.HTTPError):
            if error.code == 416:  # nothing at this position: the shard ended here
                self.end = self.position
                return
            if error.code not in PASSING_STATUS:
                raise ShardError(f"{self.url}: {error}") from error
        self.failures += 1
        if self.failures > RETRIES:
            raise ShardError(
                f"{self.url}: broken at byte {self.position}, {RETRIES} retries failed: {error}"
            ) from error
        logger.warning("%s: broken at byte %d (%s), trying again", self.url, self.position, error)
        time.sleep(RETRY_DELAY * 2 ** (self.failures - 1))

    def readinto(self, buffer) -> int:
        while self.end is None or self.position < self.end:
            try:
                if self.response is None:
                    self._connect()
                count = self.response.readinto(buffer)
                if not count and self.end is not None and self.position < self.end:
                    raise ConnectionError(f"{self.end - self.position} bytes are missing")
            except (OSError, http.client.HTTPException) as error:
                self._fail(error)
                continue
            self.position += count
            self.failures = 0 if count else self.failures
            return count
        return 0

    def _disconnect(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self) -> None:
        self._disconnect()
        super().close()


@dataclass(frozen=True, slots=True)
class StreamedSample:
    """A sample of a shard, as bytes."""

    name: str
    picture: bytes
    mask: bytes | None
    category: int
    offset: int  # of its first byte in the shard


def read_shard(shard: str, offset: int = 0) -> Iterator[StreamedSample]:
    """
    Reads the samples of a shard in order.

    Members of one sample (`KEY.jpg`, `KEY.json`, `KEY.mask.png`) follow each other, as WebDataset has it.

    Args:
        shard (`str`): Path or URL.
        offset (`int`, defaults to 0): Where to begin: 0 or the `offset` of a sample.

    Raises:
        ShardError: When the rest cannot be read.
    """
    try:
        if is_url(shard):
            raw = io.BufferedReader(ReconnectingStream(shard, offset), 1 << 20)
        else:
            raw = Path(shard).open("rb")  # noqa: SIM115, closed below
            raw.seek(offset)
        with raw, tarfile.open(fileobj=raw, mode="r|", tarinfo=_StrictTarInfo) as archive:
            key, members, start = None, {}, offset
            for member in archive:
                # A stream keeps no members: a shard of a million would fill the memory with their headers.
                archive.members = []
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if (folder, stem) != key:
                    yield from _samples(shard, members, start)
                    key, members, start = (folder, stem), {}, offset + member.offset
                if is_picture(name) or f".{suffix}".endswith((MASK_SUFFIX, ".json")):
                    members[member.name] = archive.extractfile(member).read()
            yield from _samples(shard, members, start)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(f"{shard}: {error}") from error


def _samples(shard: str, members: dict[str, bytes], start: int) -> Iterator[StreamedSample]:
    for name, data in members.items():
        if not is_picture(name):
            continue
        key = name.rpartition(".")[0]
        category = shard_category(members[f"{key}.json"]) if f"{key}.json" in members else None
        record = shard_record(f"{shard}/{name}", data, members.get(key + MASK_SUFFIX), category)
        yield StreamedSample(record.name, data, record.mask, record.category, start)


@dataclass
class StreamPosition:
    """
    Where a [`ShardStream`] is; enough to go on from there.

    Args:
        turn (`int`): Number of the shard in the endless sequence of shards over all epochs.
        offset (`int`): Byte in that shard where the present block of samples begins.
        block (`int`): Samples of that block that have been given out.
    """

    turn: int
    offset: int = 0
    block: int = 0


class ShardStream:
    """
    The share of one reader in an endless stream of samples from many shards.

    The shards of all epochs form one sequence, each epoch in another order; reader `r` of `R` reads numbers `r`,
    `r + R`, `r + 2R` and so on. So each shard is read by exactly one reader in each epoch, whatever the numbers of
    shards and readers are. Samples are shuffled in blocks of `shuffle_buffer_size` of the same shard.

    Args:
        shards (sequence of `str`): Paths and URLs.
        seed (`int`): Seed of the order.
        shuffle_buffer_size (`int`): Samples that are held in memory and shuffled; 1 leaves their order.
        position (`StreamPosition`): Where to begin; `StreamPosition(r)` at the start.
        num_readers (`int`): Number R of readers.
    """

    def __init__(
        self,
        shards: Sequence[str],
        seed: int,
        shuffle_buffer_size: int,
        position: StreamPosition,
        num_readers: int,
    ):
        self.shards, self.seed, self.shuffle_buffer_size = shards, seed, shuffle_buffer_size
        self.position, self.num_readers = position, num_readers
        self.lost: list[str] = []  # shards or rests of shards that could not be read, since the owner looked last

    def _blocks(self, shard: str, offset: int) -> Iterator[tuple[list[StreamedSample], int | None]]:
        """Blocks of samples, each with the offset of the block after it, or `None` for the last."""
        block: list[StreamedSample] = []
        try:
            for sample in read_shard(shard, offset):
                # Pictures of one key share an offset and stay together.
                if len(block) >= self.shuffle_buffer_size and sample.offset != block[-1].offset:
                    yield block, sample.offset
                    block = []
                block.append(sample)
        except ShardError as error:
            logger.warning("skipped the rest of a shard: %s", error)
            self.lost.append(str(error))
        yield block, None

    def __iter__(self) -> Iterator[tuple[int, StreamedSample | None]]:
        """Yields epochs and samples; `position` is then behind the sample. A `None` is the end of a shard."""
        while True:
            start = self.position
            epoch, number = divmod(start.turn, len(self.shards))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
            shard = self.shards[order[number]]
            offset, done = start.offset, start.block
            for block, next_offset in self._blocks(shard, offset):
                shuffled = np.random.default_rng((self.seed, start.turn, offset)).permutation(len(block))
                for index in range(done, len(block)):
                    self.position = StreamPosition(start.turn, offset, index + 1)
                    yield epoch, block[shuffled[index]]
                if next_offset is not None:
                    offset, done = next_offset, 0
            self.position = StreamPosition(start.turn + self.num_readers)
            yield epoch, None


def expand_shards(sources: Sequence[str | Path]) -> list[str]:
    """Every shard that URLs, paths and patterns of them name, in order."""
    shards = []
    for source in sources:
        if is_url(source):
            if "*" in str(source):
                raise ValueError(f"`sources` may use braces in URLs but no `*`: {str(source)!r}.")
            shards += expand_braces(str(source))
        else:
            shards += [str(path) for path in find_shards(source)]
    for shard in shards:
        if shard.startswith("hf://"):
            resolve_url(shard)
    return shards


def number_of_name(name: str) -> int:
    """A number that stands for a sample's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
