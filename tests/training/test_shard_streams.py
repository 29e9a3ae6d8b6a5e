import http.server
import io
import json
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moebius.training import shard_streams
from diffusers_moebius.training.data import TrainingBatches, open_training_data
from diffusers_moebius.training.picture_datasets import StreamedPictureDataset
from diffusers_moebius.training.shard_streams import (
    ReconnectingStream,
    ShardError,
    ShardStream,
    StreamPosition,
    expand_shards,
    read_shard,
    resolve_url,
)


def picture_bytes(shade, size=(24, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 100, 255 - shade)).save(file, "PNG")
    return file.getvalue()


def mask_bytes(size=(24, 20)):
    file = io.BytesIO()
    mask = Image.new("L", size)
    mask.paste(255, (4, 4, 14, 12))
    mask.save(file, "PNG")
    return file.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three shards of six pictures; one of each is no picture. A long name makes tar write two headers."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        members = []
        for number in range(6):
            key = f"{shard}{number}" + ("-long" * 30 if number == 4 else "")
            data = b"no picture" if number == 2 else picture_bytes(40 * shard + number)
            members += [(f"{key}.png", data), (f"{key}.json", json.dumps({"author": "nobody"}).encode())]
        write_shard(folder / f"photos-{shard:03d}.tar", members)
    return folder


@pytest.fixture
def server(shards, monkeypatch):
    """Serves the shards, with ranges, and misbehaves as `server.faults` says: one entry for each request to come."""
    monkeypatch.setattr(shard_streams, "RETRY_DELAY", 0.001)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fault = self.server.faults.pop(0) if self.server.faults else None
            self.server.requests.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
            path = shards / self.path.lstrip("/")
            if isinstance(fault, int) or not path.exists():
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            data = path.read_bytes()
            start = 0
            if self.headers.get("Range") and self.server.knows_ranges:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + 3000] if fault == "cut" else data[start:])

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.requests, server.knows_ranges = [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def names(samples):
    return [sample.name.rpartition("/")[2][:2] for sample in samples]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_broken_connection_goes_on_where_it_broke(server, shards, knows_ranges):
    server.knows_ranges = knows_ranges
    server.faults = ["cut", 503, "cut"] if knows_ranges else ["cut", 503]
    samples = list(read_shard(f"{server.url}/photos-000.tar"))
    local = list(read_shard(str(shards / "photos-000.tar")))
    assert [(s.picture, s.offset) for s in samples] == [(s.picture, s.offset) for s in local]
    assert [request[1] for request in server.requests[:3]] == [None, "bytes=3000-", "bytes=3000-"]


def test_shard_that_stays_away_is_an_error_after_retries_and_one_that_is_missing_at_once(server):
    server.faults = [500] * 20
    with pytest.raises(ShardError, match=r"photos-000\.tar: broken at byte 0, 5 retries failed"):
        list(read_shard(f"{server.url}/photos-000.tar"))
    assert len(server.requests) == 6
    server.faults = []
    server.requests.clear()
    with pytest.raises(ShardError, match="404"):
        list(read_shard(f"{server.url}/elsewhere.tar"))
    assert len(server.requests) == 1


def test_stream_that_begins_at_a_sample_asks_for_the_rest_only(server, shards):
    whole = list(read_shard(str(shards / "photos-001.tar")))
    for sample in whole:
        rest = list(read_shard(f"{server.url}/photos-001.tar", sample.offset))
        assert names(rest) == names(whole)[whole.index(sample) :]
    assert server.requests[-1][1] == f"bytes={whole[-1].offset}-"


def test_token_goes_to_the_hub_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    address, headers = resolve_url("hf://datasets/someone/photos@main/data/000.tar")
    assert address.endswith("/datasets/someone/photos/resolve/main/data/000.tar")
    assert headers["authorization"] == "Bearer hf_secret"
    assert resolve_url("https://example.org/000.tar") == ("https://example.org/000.tar", {})
    with pytest.raises(ValueError, match="owner/name"):
        resolve_url("hf://datasets/photos.tar")


def test_hub_url_is_read_with_the_token_that_a_redirect_does_not_get(server, shards, monkeypatch):
    monkeypatch.setattr(
        shard_streams, "resolve_url", lambda url: (f"{server.url}/photos-000.tar", {"authorization": "Bearer secret"})
    )
    with ReconnectingStream("hf://datasets/a/b/photos-000.tar") as stream:
        assert stream.read() == (shards / "photos-000.tar").read_bytes()
    assert server.requests[0][2] == "Bearer secret"


@pytest.mark.parametrize("num_readers", [1, 2, 3, 4, 5])
def test_each_sample_goes_to_one_reader_in_each_epoch(shards, num_readers):
    paths = expand_shards([shards / "photos-{000..002}.tar"])
    rounds = 2 * num_readers  # epochs in which every reader has read the same number of shards
    seen = {}
    for reader in range(num_readers):
        stream = ShardStream(paths, 0, 4, StreamPosition(reader), num_readers)
        ends = 0
        for epoch, sample in stream:
            ends += sample is None
            if sample is not None:
                seen.setdefault(epoch, []).append(sample.name)
            if ends == 3 * rounds // num_readers:
                break
    assert sorted(seen) == list(range(rounds))
    assert all(len(found) == len(set(found)) == 18 for found in seen.values())
    assert len({tuple(found) for found in seen.values()}) > 1


def test_blocks_are_shuffled_and_one_sample_is_no_shuffling(shards):
    paths = [str(shards / "photos-000.tar")]

    def first_epoch(size, seed=0):
        stream = ShardStream(paths, seed, size, StreamPosition(0), 1)
        found = []
        for _, sample in stream:
            if sample is None:
                return found
            found.append(sample)

    in_order = [f"0{number}" for number in range(6)]
    assert names(first_epoch(1)) == in_order
    assert names(first_epoch(6)) != in_order and sorted(names(first_epoch(6))) == in_order
    assert sorted(names(first_epoch(3))[:3]) == in_order[:3]
    assert names(first_epoch(6)) == names(first_epoch(6)) != names(first_epoch(6, seed=1))


def take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("with_states", [True, False])
def test_stream_resumes_with_the_next_sample(server, num_workers, with_states):
    def batches(first_batch=0, states=None, process_index=0):
        data = open_training_data(
            16,
            ["thick_256"],
            3,
            train_shards_path_or_url=[server.url + "/photos-{000..002}.tar"],
            shuffle_buffer_size=4,
        )
        assert isinstance(data, StreamedPictureDataset)
        return TrainingBatches(data, 2, 3, first_batch, process_index, 2, num_workers, states)

    whole = take(batches(), 9)  # more than the process's share of an epoch
    for stop in (1, 4):
        states = []
        for rank in range(2):
            first = batches(process_index=rank)
            take(first, stop)
            states.append(json.loads(json.dumps(first.state_dict())))
        server.requests.clear()
        resumed = batches(stop, states if with_states else None)
        assert_equal_batches(take(resumed, 9 - stop), whole[stop:])
    skipped = batches()
    take(skipped, 9)
    assert len(skipped.skipped) > 1 and all("2.png" in name for name in skipped.skipped)


def test_masks_are_those_of_the_sample_whatever_the_number_of_workers(shards):
    data = open_training_data(
        16, ["thick_256"], 3, train_shards_path_or_url=[shards / "*.tar"], stream_shards=True, shuffle_buffer_size=4
    )
    seen = []
    for num_workers in (0, 2):
        samples = {}
        # Two rounds of two readers: both have read epochs 0 and 1 to their end.
        for batch in take(TrainingBatches(data, 1, 3, num_workers=num_workers), 30):
            for pixels, mask in zip(batch["pixel_values"], batch["mask"]):
                samples.setdefault(pixels.numpy().tobytes(), set()).add(mask.numpy().tobytes())
        seen.append(samples)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) == 15  # plain pictures: a crop says which one it is
    first_epochs = [{mask for masks in samples.values() for mask in masks} for samples in seen]
    assert len(first_epochs[0]) == 30 and first_epochs[0] == first_epochs[1]


def test_other_number_of_workers_goes_on_behind_the_furthest_reader(shards, caplog):
    data = open_training_data(16, ["thick_256"], 3, train_shards_path_or_url=[shards / "*.tar"], stream_shards=True)
    first = TrainingBatches(data, 2, 3)
    take(first, 9)
    state = first.state_dict()
    resumed = TrainingBatches(data, 2, 3, 9, num_processes=2, states=[state])
    assert [position.turn for position in resumed.positions] == [state["positions"][0][0] + 1]
    assert "left out" in caplog.text
    with pytest.raises(ValueError, match="`first_batch`"):
        TrainingBatches(data, 2, 3, 8, states=[state])


def test_lost_shard_is_reported_and_nothing_at_all_is_an_error(server, shards):
    (shards / "photos-001.tar").unlink()
    data = open_training_data(16, ["thick_256"], 0, train_shards_path_or_url=[server.url + "/photos-{000..002}.tar"])
    batches = TrainingBatches(data, 5, 0)
    take(batches, 4)
    assert any("photos-001.tar" in name and "404" in name for name in batches.skipped)
    for shard in shards.glob("*.tar"):
        write_shard(shard, [("a.jpg", b""), ("b.png", b"text")])
    with pytest.raises(ValueError, match="no readable picture"):
        take(TrainingBatches(data, 5, 0), 1)


@pytest.mark.parametrize("length", [700, 1200])  # in a picture, in the header after it
def test_truncated_local_shard_is_an_error(shards, length):
    shard = shards / "photos-000.tar"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(ShardError, match=r"photos-000\.tar"):
        list(read_shard(str(shard)))


def test_categories_and_masks_of_shards(tmp_path):
    members = []
    for key, entry in (("a", {"category": "foreground"}), ("b", {"category": "background"}), ("c", {})):
        members += [(f"{key}.json", json.dumps(entry).encode()), (f"{key}.mask.png", mask_bytes())]
        members.append((f"{key}.png", picture_bytes(7)))
    write_shard(tmp_path / "a.tar", members)
    streamed = list(read_shard(str(tmp_path / "a.tar")))
    assert [(sample.category, sample.mask is not None) for sample in streamed] == [(1, True), (0, True), (-1, False)]
    for stream in (True, False):
        data = open_training_data(
            16, ["thick_256"], 0, train_shards_path_or_url=[tmp_path / "a.tar"], stream_shards=stream
        )
        (batch,) = take(TrainingBatches(data, 3, 0), 1)
        assert sorted(batch["category"].tolist()) == [-1, 0, 1] and batch["category"].dtype == torch.int64
    write_shard(tmp_path / "bad.tar", [("a.json", b'{"category": "sky"}'), ("a.png", picture_bytes(7))])
    for stream in (True, False):
        with pytest.raises(ValueError, match=r"`category`.*sky.*bad\.tar"):
            data = open_training_data(
                16, ["thick_256"], 0, train_shards_path_or_url=[tmp_path / "bad.tar"], stream_shards=stream
            )
            take(TrainingBatches(data, 1, 0), 1)


def test_streamed_mask_of_another_size_is_an_error(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [
            ("a.png", picture_bytes(7)),
            ("a.mask.png", mask_bytes((20, 20))),
            ("a.json", b'{"category": "foreground"}'),
        ],
    )
    data = open_training_data(16, ["thick_256"], 0, train_shards_path_or_url=[tmp_path / "a.tar"], stream_shards=True)
    with pytest.raises(ValueError, match=r"24×20, but is 20×20 in .*a\.png"):
        take(TrainingBatches(data, 1, 0), 1)


def test_masks_are_not_empty_after_cropping(tmp_path):
    members = [("a.png", picture_bytes(7)), ("a.mask.png", mask_bytes()), ("a.json", b'{"category": "foreground"}')]
    write_shard(tmp_path / "a.tar", members)
    data = open_training_data(16, ["thick_256"], 0, train_shards_path_or_url=[tmp_path / "a.tar"], stream_shards=True)
    for batch in take(TrainingBatches(data, 1, 0), 20):
        assert np.asarray(batch["mask"]).any()
