import http.server
import io
import json
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from runs import open_data, take

from diffusers_moebius.training.crops import Cropper
from diffusers_moebius.training.data import StreamedPictureDataset, TrainingBatches
from diffusers_moebius.training.picture_sources import number_of_name, read_shard


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
    monkeypatch.setattr("datasets.config.STREAMING_READ_RETRY_INTERVAL", 0.001)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_RETRY_INTERVAL", 0.001)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            fault = self.server.faults.pop(0) if self.server.faults and self.command == "GET" else None
            self.server.requests.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
            path = shards / self.path.lstrip("/")
            if not path.exists():
                self.send_error(404)
                return
            data = path.read_bytes()
            start, end = 0, len(data)
            if asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                start, end = int(first), min(int(last or end) + 1, end)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[start:end][:3000] if fault == "cut" else data[start:end])

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.requests = [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def names(samples):
    return [sample.name.rpartition("/")[2][:2] for sample in samples]


def test_broken_connection_is_tried_again(server, shards):
    server.faults = ["cut", "cut"]
    lost = []
    samples = list(read_shard(f"{server.url}/photos-000.tar", lost))
    assert [sample.picture for sample in samples] == [
        sample.picture for sample in read_shard(str(shards / "photos-000.tar"), lost)
    ]
    assert not server.faults and not lost


def test_shard_that_is_missing_is_lost(server):
    lost = []
    assert not list(read_shard(f"{server.url}/elsewhere.tar", lost))
    assert len(lost) == 1 and "elsewhere.tar: FileNotFoundError" in lost[0]


def test_private_repository_is_read_with_the_token_of_the_hub(shards, monkeypatch):
    """From a server that answers as the hub does, and only with the token."""
    data = (shards / "photos-000.tar").read_bytes()
    refused = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != "Bearer hf_secret":
                refused.append(self.path)
                self.send_error(401)
                return
            body, status = data, 200
            if "/tree/" in self.path or "/paths-info/" in self.path:
                body = json.dumps([{"type": "file", "path": "a/000.tar", "size": len(data), "oid": "0" * 40}]).encode()
            elif self.path.startswith("/api/"):
                body = json.dumps({"id": "someone/private", "sha": "0" * 40, "private": True}).encode()
            elif asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                body, status = data[int(first) : int(last) + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_HEAD = answer

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        samples = list(read_shard("hf://datasets/someone/private/a/000.tar", []))
        hub.shutdown()
    assert names(samples) == [f"0{number}" for number in range(6)] and not refused


def stream(paths, seed=0, shuffle_buffer_size=4, process_index=0, num_processes=1):
    data = StreamedPictureDataset(list(map(str, paths)), Cropper(16, ["thick_256"], seed), shuffle_buffer_size)
    data.process_index, data.num_processes = process_index, num_processes
    return data


def first_records(dataset, monkeypatch, count):
    """The records, with their epochs, that a data set decodes first."""
    found = []

    def crop(cropper, record, number):
        assert number[1] == number_of_name(record.name)
        found.append((number[0], record.name))
        return {"pixel_values": torch.zeros(3, 16, 16), "mask": torch.ones(1, 1, 16, 16)}

    monkeypatch.setattr(Cropper, "__call__", crop)
    take(dataset, count)
    return found


@pytest.mark.parametrize("num_readers", [1, 2, 3, 4, 5])
def test_each_sample_goes_to_one_reader_in_each_epoch(shards, monkeypatch, num_readers):
    paths = sorted(shards.glob("*.tar"))
    rounds = 2 * num_readers  # epochs in which every reader has read the same number of shards
    seen = {}
    for reader in range(num_readers):
        data = stream(paths, process_index=reader, num_processes=num_readers)
        for epoch, name in first_records(data, monkeypatch, 6 * 3 * rounds // num_readers):
            seen.setdefault(epoch, []).append(name)
    assert sorted(seen) == list(range(rounds))
    assert all(len(found) == len(set(found)) == 18 for found in seen.values())
    assert len({tuple(found) for found in seen.values()}) > 1


def test_blocks_are_shuffled_and_one_sample_is_no_shuffling(shards, monkeypatch):
    def first_epoch(size, seed=0):
        data = stream([shards / "photos-000.tar"], seed, size)
        return [name.rpartition("/")[2][:2] for _, name in first_records(data, monkeypatch, 6)]

    in_order = [f"0{number}" for number in range(6)]
    assert first_epoch(1) == in_order
    assert first_epoch(6) != in_order and sorted(first_epoch(6)) == in_order
    assert sorted(first_epoch(3)[:3]) == in_order[:3]
    assert first_epoch(6) == first_epoch(6) != first_epoch(6, seed=1)


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_resumes_with_the_next_sample(server, num_workers):
    """In the middle of a shard, in each of two processes with their own workers."""

    def batches(first_batch=0, states=None, process_index=0):
        data = open_data(
            16,
            train_shards_path_or_url=[server.url + "/photos-{000..002}.tar"],
            shuffle_buffer_size=4,
        )
        assert isinstance(data, StreamedPictureDataset)
        return TrainingBatches(data, 2, 3, first_batch, process_index, 2, num_workers, states)

    whole = take(batches(process_index=1), 9)  # more than the process's share of an epoch
    for stop in (1, 4):
        states = []
        for rank in range(2):
            first = batches(process_index=rank)
            take(first, stop)
            states.append(pickle.loads(pickle.dumps(first.state_dict())))
        resumed = batches(stop, states, process_index=1)
        assert_equal_batches(take(resumed, 9 - stop), whole[stop:])
    skipped = batches()
    take(skipped, 9)
    assert len(skipped.skipped) > 1 and all("2.png" in name for name in skipped.skipped)


def test_masks_are_those_of_the_sample_whatever_the_number_of_workers(shards):
    data = open_data(16, train_shards_path_or_url=[shards / "*.tar"], stream_shards=True, shuffle_buffer_size=4)
    seen = []
    for num_workers in (0, 2):
        samples = {}
        # Two rounds of two readers: both have read epochs 0 and 1 to their end.
        data.turn, data.given = None, 0
        for batch in take(TrainingBatches(data, 1, 3, num_workers=num_workers), 30):
            for pixels, mask in zip(batch["pixel_values"], batch["mask"]):
                samples.setdefault(pixels.numpy().tobytes(), set()).add(mask.numpy().tobytes())
        seen.append(samples)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) == 15  # plain pictures: a crop says which one it is
    first_epochs = [{mask for masks in samples.values() for mask in masks} for samples in seen]
    assert len(first_epochs[0]) == 30 and first_epochs[0] == first_epochs[1]


def test_other_numbers_of_readers_are_refused(shards):
    data = open_data(16, train_shards_path_or_url=[shards / "*.tar"], stream_shards=True)
    first = TrainingBatches(data, 2, 3)
    take(first, 9)
    for numbers in ({"num_processes": 2}, {"num_workers": 1}):
        with pytest.raises(ValueError, match=r"`--dataloader_num_workers`.*\(1 processes with 0\)"):
            TrainingBatches(data, 2, 3, 9, states=[first.state_dict()], **numbers)


def test_lost_shard_is_reported_and_nothing_at_all_is_an_error(server, shards):
    (shards / "photos-001.tar").unlink()
    data = open_data(16, train_shards_path_or_url=[server.url + "/photos-{000..002}.tar"])
    batches = TrainingBatches(data, 5, 0)
    take(batches, 4)
    assert any("photos-001.tar: FileNotFoundError" in name for name in batches.skipped)
    for shard in shards.glob("*.tar"):
        write_shard(shard, [("a.jpg", b""), ("b.png", b"text")])
    with pytest.raises(ValueError, match="no readable picture"):
        take(TrainingBatches(data, 5, 0), 1)


@pytest.mark.parametrize("length", [700, 1200])  # in a picture, in the header after it
def test_truncated_shard_is_read_as_far_as_it_goes(shards, length):
    shard = shards / "photos-000.tar"
    shard.write_bytes(shard.read_bytes()[:length])
    for stream in (True, False):
        lost = []
        assert not list(read_shard(str(shard), lost, stream))
        assert len(lost) == 1 and "photos-000.tar: ReadError" in lost[0]


@pytest.mark.parametrize("stream", [True, False])
def test_rest_of_a_broken_shard_is_skipped_and_reported(shards, caplog, stream):
    (shards / "photos-000.tar").unlink()
    shard = shards / "photos-001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    data = open_data(16, train_shards_path_or_url=[shards / "*.tar"], stream_shards=stream, shuffle_buffer_size=1)
    batches = TrainingBatches(data, 1, 0)
    take(batches, 12)
    assert "photos-001.tar: ReadError" in caplog.text
    assert not stream or any("photos-001.tar: ReadError" in name for name in batches.skipped)


def test_categories_and_masks_of_shards(tmp_path):
    members = []
    for key, entry in (("a", {"category": "foreground"}), ("b", {"category": "background"}), ("c", {})):
        members += [(f"{key}.json", json.dumps(entry).encode()), (f"{key}.mask.png", mask_bytes())]
        members.append((f"{key}.png", picture_bytes(7)))
    write_shard(tmp_path / "a.tar", members)
    streamed = list(read_shard(str(tmp_path / "a.tar"), []))
    assert [(sample.category, sample.mask is not None) for sample in streamed] == [(1, True), (0, True), (-1, False)]
    for stream in (True, False):
        data = open_data(16, train_shards_path_or_url=[tmp_path / "a.tar"], stream_shards=stream)
        (batch,) = take(TrainingBatches(data, 3, 0), 1)
        assert sorted(batch["category"].tolist()) == [-1, 0, 1] and batch["category"].dtype == torch.int64
    write_shard(tmp_path / "bad.tar", [("a.json", b'{"category": "sky"}'), ("a.png", picture_bytes(7))])
    for stream in (True, False):
        with pytest.raises(ValueError, match=r"`category`.*sky.*bad\.tar"):
            data = open_data(16, train_shards_path_or_url=[tmp_path / "bad.tar"], stream_shards=stream)
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
    data = open_data(16, train_shards_path_or_url=[tmp_path / "a.tar"], stream_shards=True)
    with pytest.raises(ValueError, match=r"24×20, but is 20×20 in .*a\.png"):
        take(TrainingBatches(data, 1, 0), 1)


def test_masks_are_not_empty_after_cropping(tmp_path):
    members = [("a.png", picture_bytes(7)), ("a.mask.png", mask_bytes()), ("a.json", b'{"category": "foreground"}')]
    write_shard(tmp_path / "a.tar", members)
    data = open_data(16, train_shards_path_or_url=[tmp_path / "a.tar"], stream_shards=True)
    for batch in take(TrainingBatches(data, 1, 0), 20):
        assert np.asarray(batch["mask"]).any()
