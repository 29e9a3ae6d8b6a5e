import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import open_data, take

from diffusers_moebius.training.data import TrainingBatches
from diffusers_moebius.training.picture_sources import (
    expand_shards,
    list_pictures,
    read_metadata,
    read_picture,
)

PRESETS = ["thick_256"]


def save_picture(path, size=(48, 40), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_mask(path, box=(10, 10, 30, 25), size=(48, 40)):
    mask = Image.new("L", size)
    if box is not None:
        mask.paste(255, box)
    mask.save(path)


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def png_bomb():
    """A PNG of a few bytes that says it is 30,000 × 30,000."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def broken_dir(tmp_path):
    folder = tmp_path / "broken"
    save_picture(folder / "good.jpg")
    truncated = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(truncated[: len(truncated) // 2])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_bomb())
    return folder


def test_folder_and_shard_give_the_same_pictures_and_report_the_unreadable(photo_dir, shard, caplog):
    contents = []
    for source in (photo_dir, str(shard.parent / "photos-*.tar")):
        records = list_pictures([source])
        assert len(records) == 13  # the mask is no picture
        pictures = [read_picture(record) for record in records]
        assert [r.name.rpartition("/")[2] for r, p in zip(records, pictures) if p is None] == ["03-broken.jpg"]
        assert caplog.text.count("skipped, unreadable") == len(contents) + 1
        images = [picture[0] for picture in pictures if picture]
        assert all(image.size == (48, 40) and image.mode == "RGB" for image in images)
        contents.append(sorted(image.tobytes() for image in images))
    assert contents[0] == contents[1]


@pytest.mark.parametrize("missing", ["nothing", "empty"])
def test_sources_without_pictures_are_refused(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`sources`"):
        list_pictures([tmp_path / missing])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_pictures_are_skipped_and_counted_in_every_process(broken_dir, num_workers):
    data = open_data(16, train_data_dir=[broken_dir])
    batches = TrainingBatches(data, 5, 0, num_workers=num_workers)
    first, _ = take(batches, 2)
    assert first["pixel_values"].shape == (5, 3, 16, 16)
    names = {name.rpartition("/")[2] for name in batches.skipped}
    assert names == {"truncated.jpg", "text.jpg", "empty.png", "bomb.png"}
    assert min(batches.skipped.values()) >= 2  # two epochs


def test_nothing_readable_is_an_error(broken_dir):
    (broken_dir / "good.jpg").unlink()
    data = open_data(16, train_data_dir=[broken_dir])
    with pytest.raises(ValueError, match="no readable picture: all 4 were skipped"):
        take(TrainingBatches(data, 2, 0), 1)


@pytest.fixture
def metadata(tmp_path):
    folder = tmp_path / "set"
    for number in range(4):
        save_picture(folder / f"photos/{number}.png", seed=number)
    save_mask(folder / "object.png")
    return write_lines(
        folder / "lines.jsonl",
        {"image": "photos/0.png", "mask": "object.png", "category": "foreground"},
        {"image": "photos/1.png", "category": "background"},
        "",
        {"image": "photos/2.png", "mask": "object.png"},
        {"image": "photos/3.png"},
    )


def test_lines_decide_masks_and_categories(metadata):
    data = open_data(40, train_metadata=[metadata])
    assert len(data) == 4
    (batch,) = take(TrainingBatches(data, 4, 0), 1)
    assert sorted(batch["category"].tolist()) == [-1, -1, 0, 1] and batch["category"].dtype == torch.int64
    foreground, background, masked, plain = range(4)
    for index in (foreground, masked):
        masks = data.cropper(data.records[index], (0, index), 3)["mask"]
        assert torch.equal(masks[0], masks[1])  # its own, however many are asked for
        rows, columns = masks[0, 0].numpy().nonzero()  # and still a box
        assert masks[0].sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    masks = data.cropper(data.records[plain], (0, plain), 3)["mask"]
    assert not torch.equal(masks[0], masks[1])
    assert data[background]["category"] == 0


def test_background_holes_are_random_own_and_cut_to_objects(tmp_path):
    """Where only the left half is an object and only the top half is a scene's segment."""
    folder = tmp_path / "set"
    save_picture(folder / "a.png")
    save_mask(folder / "object.png", (0, 0, 24, 40))
    save_mask(folder / "segment.png", (0, 0, 48, 20))
    path = write_lines(
        folder / "lines.jsonl",
        {"image": "a.png", "mask": "segment.png", "category": "background"},
        {"image": "a.png", "mask": "object.png", "category": "foreground"},
    )
    data = open_data(32, train_metadata=[path])
    cut = whole = 0
    for epoch in range(120):
        mask = data[2 * epoch]["mask"][0]
        cut += not mask[:, 16:].any()
        whole += bool(mask[:, 16:].any())
    assert 25 < cut < 95 and whole > 25


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"JSON lines with paths `image`.*line 2 is {"),
        ("[1]", r"JSON lines with paths `image`.*line 2 is \[1\]"),
        ({"mask": "object.png"}, r"JSON lines with paths `image`.*line 2 is .*object\.png"),
        ({"image": "photos/0.png", "category": "sky"}, r"`category` must be one of background, foreground.*line 2"),
        ({"image": "photos/0.png", "category": "foreground"}, r"foreground needs the object's `mask`, but .*line 2"),
        ({"image": "photos/0.png", "mask": 3}, r"perhaps `mask`, but .*line 2 is .*: 3"),
    ],
)
def test_wrong_lines_are_named(metadata, line, message):
    write_lines(metadata, {"image": "photos/1.png"}, line)
    with pytest.raises(ValueError, match=message):
        read_metadata(metadata)


@pytest.mark.parametrize(("box", "size"), [((1, 1, 5, 5), (40, 48)), (None, (48, 40))])
def test_mask_that_does_not_fit_is_an_error_with_its_line(metadata, box, size):
    save_mask(metadata.parent / "wrong.png", box, size)
    write_lines(metadata, {"image": "photos/1.png"}, {"image": "photos/0.png", "mask": "wrong.png"})
    data = open_data(16, train_metadata=[metadata])
    message = "empty" if box is None else "48×40, but is 40×48"
    with pytest.raises(ValueError, match=f"`mask`.*{message}.*line 2"):
        take(TrainingBatches(data, 2, 0), 1)


def test_missing_files_in_lines_are_reported_with_their_lines(metadata):
    write_lines(
        metadata,
        {"image": "photos/1.png"},
        {"image": "nowhere.png"},
        {"image": "photos/0.png", "mask": "nowhere.png"},
    )
    batches = TrainingBatches(open_data(16, train_metadata=[metadata]), 3, 0)
    take(batches, 1)
    assert sorted(name.rpartition(", ")[2] for name in batches.skipped) == ["line 2)", "line 3)"]
    with pytest.raises(ValueError, match="`train_metadata`"):
        open_data(16, train_metadata=[metadata.parent / "nowhere.jsonl"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_with_workers_and_after_resuming(photo_dir, num_workers):
    def batches(first=0, workers=num_workers, states=None):
        data = open_data(32, seed=5, train_data_dir=[photo_dir])
        return TrainingBatches(data, 3, 5, first, num_workers=workers, states=states)

    whole = take(batches(workers=0), 9)  # four make an epoch
    for first, expected in ((0, whole), (6, whole[6:])):
        for batch, other in zip(take(batches(first), len(expected)), expected):
            assert batch.keys() == other.keys()
            assert all(torch.equal(batch[name], other[name]) for name in batch)
    interrupted = batches()
    take(interrupted, 6)
    (after,) = take(batches(6, states=[interrupted.state_dict()]), 1)
    assert torch.equal(after["mask"], whole[6]["mask"])


def test_loading_leaves_the_generator_of_the_run_alone(photo_dir):
    data = open_data(32, seed=5, train_data_dir=[photo_dir])
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(TrainingBatches(data, 3, 5), 2)
    assert torch.equal(torch.rand(3), expected)


def test_only_so_many_samples_as_are_asked_for(photo_dir):
    data = open_data(16, train_data_dir=[photo_dir], max_train_samples=3)
    assert len(data) == 3
    with pytest.raises(ValueError, match="`--train_batch_size` must be at most the number of samples, 3, but is 16"):
        TrainingBatches(data, 16, 0)
    with pytest.raises(ValueError, match="`max_train_samples`"):
        open_data(16, train_shards_path_or_url=["https://example.org/a.tar"], max_train_samples=3)


def test_sources_that_are_missing_or_do_not_mix_are_refused(photo_dir, metadata, shard):
    with pytest.raises(ValueError, match=r"`train_data_dir`.*must be given"):
        open_data(16)
    with pytest.raises(ValueError, match="cannot be mixed"):
        open_data(16, train_data_dir=[photo_dir], train_shards_path_or_url=["https://example.org/a.tar"])
    with pytest.raises(ValueError, match=r"`sources` must name folders, tar shards.*elsewhere"):
        open_data(16, train_data_dir=[photo_dir / "elsewhere"])
    with pytest.raises(ValueError, match=r"without `\*`.*example\.org"):
        open_data(16, train_shards_path_or_url=["https://example.org/*.tar"])
    with pytest.raises(ValueError, match="`sources`"):
        open_data(16, train_shards_path_or_url=[str(shard.parent / "photos-{000000..000001}.tar")])
    mixed = open_data(16, train_data_dir=[photo_dir], train_shards_path_or_url=[shard], train_metadata=[metadata])
    assert len(mixed) == 13 + 13 + 4


@given(
    first=st.integers(0, 2000),
    count=st.integers(1, 30),
    width=st.integers(1, 6),
    prefix=st.text(st.characters(categories=["L", "N"]), max_size=5),
)
def test_ranges_in_braces(first, count, width, prefix):
    low, high = str(first).zfill(width), str(first + count - 1).zfill(width)
    width = max(len(low), len(high)) if low.startswith("0") and len(low) > 1 else 0
    expected = [f"hf://a/b/{prefix}-{number:0{width}d}.tar" for number in range(first, first + count)]
    assert expand_shards(f"hf://a/b/{prefix}-{{{low}..{high}}}.tar") == expected


def test_lists_in_braces_and_wrong_braces():
    assert expand_shards("hf://{a,b}/{1..2}") == ["hf://a/1", "hf://a/2", "hf://b/1", "hf://b/2"]
    with pytest.raises(ValueError, match="`sources` must have braces in pairs"):
        expand_shards("hf://a{b,c")


def test_hub_data_sets_and_their_errors(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = []
    for number in range(5):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (number, 0, 0)).save(file, "PNG")
        pictures.append({"path": None, "bytes": file.getvalue() if number != 3 else b"no picture"})
    table = datasets.Dataset.from_dict({"photo": pictures, "text": list("abcde")})
    table = table.cast_column("photo", datasets.Image(decode=False))
    (tmp_path / "hub").mkdir()
    table.cast_column("photo", datasets.Image()).to_parquet(tmp_path / "hub" / "train.parquet")

    def open_table(**options):
        return open_data(16, dataset_name=str(tmp_path / "hub"), **options)

    data = open_table(image_column="photo")
    batches = TrainingBatches(data, 5, 0, num_workers=2)
    (batch,) = take(batches, 1)
    assert batch["pixel_values"].shape == (5, 3, 16, 16) and list(batches.skipped) == ["row 3"]
    with pytest.raises(ValueError, match=r"`image_column` must hold pictures, but 'image' is None of .*photo"):
        open_table()
    with pytest.raises(ValueError, match="`image_column` must hold pictures"):
        open_table(image_column="text")
