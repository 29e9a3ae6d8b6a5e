"""Where results go."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from photo_files import contents, mask_image, photo_image
from PIL import Image

from diffusers_moebius.batch.photo import Item, MaskOptions, read_photo
from diffusers_moebius.batch.sinks import FileSink, ShardSink, named_in


def read(key="a.png", seed=0):
    return read_photo(Item(key, contents(photo_image(seed)), [contents(mask_image())]), MaskOptions())


class TestFiles:
    @pytest.mark.parametrize(
        "pattern, path",
        [
            ("{folder}/{name}", "album/a.png"),
            ("{stem}-clean.jpg", "a-clean.jpg"),
            ("{folder}/done/{stem}{suffix}", "album/done/a.png"),
        ],
    )
    def test_pattern(self, tmp_path, pattern, path):
        assert named_in(tmp_path, pattern)(Item("album/a.png", b"", [])) == tmp_path / path

    @pytest.mark.parametrize("pattern", ["{date}", "{}", "{name"])
    def test_unknown_parts(self, tmp_path, pattern):
        with pytest.raises(ValueError, match="`--output-pattern`"):
            named_in(tmp_path, pattern)

    @pytest.mark.parametrize("key", ["../a.png", "/etc/a.png", "album/../../a.png"])
    def test_nothing_is_written_outside_the_folder(self, tmp_path, key):
        sink = FileSink(named_in(tmp_path))
        assert not sink.holds(Item(key, b"", []))
        with pytest.raises(ValueError, match="outside"):
            sink.check(read(key))

    def test_writes_and_knows_what_is_there(self, tmp_path):
        sink, photo = FileSink(named_in(tmp_path / "out")), read("album/a.png")
        assert not sink.holds(photo.item) and sink.check(photo) == []
        assert sink.write(photo, photo.image) == [tmp_path / "out" / "album" / "a.png"]
        assert sink.holds(photo.item)
        assert np.array_equal(Image.open(tmp_path / "out" / "album" / "a.png"), photo.image)
        with pytest.raises(ValueError, match="exists already"):
            sink.check(photo)
        FileSink(named_in(tmp_path / "out"), overwrite=True).check(photo)

    def test_two_photos_of_one_name_are_an_error_of_the_second(self, tmp_path):
        sink = FileSink(named_in(tmp_path, "{name}"))
        sink.check(read("a/x.png"))
        with pytest.raises(ValueError, match=r"b/x.png and a/x.png would both be written to .*x.png"):
            sink.check(read("b/x.png"))

    def test_preview(self, tmp_path):
        sink, photo = FileSink(named_in(tmp_path), preview=True), read()
        paths = sink.write(photo, photo.image)
        assert [path.name for path in paths] == ["a.png", "a.png.preview.png"]
        assert Image.open(paths[1]).size == (3 * photo.image.width, photo.image.height)


@pytest.fixture(params=[".tar", ".parquet"])
def suffix(request):
    if request.param == ".parquet":
        pytest.importorskip("pyarrow")
    return request.param


def rows(path: Path) -> dict[str, bytes]:
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            return {name: archive.extractfile(name).read() for name in archive.getnames()}
    from pyarrow.parquet import read_table

    table = read_table(path).to_pydict()
    return dict(zip(table["key"], table["image"]))


class TestShards:
    def test_shards_appear_when_they_are_full_and_at_the_end(self, tmp_path, suffix):
        sink = ShardSink(tmp_path / "out", suffix, size=2)
        photos = [read(f"album/{number}.png", number) for number in range(3)]
        assert [sink.write(photo, photo.image) for photo in photos] == [
            [],
            [tmp_path / "out" / f"00000{suffix}"],
            [],
        ]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"00000{suffix}"]
        assert sink.close() == [tmp_path / "out" / f"00001{suffix}"] and sink.close() == []
        stored = rows(tmp_path / "out" / f"00000{suffix}") | rows(tmp_path / "out" / f"00001{suffix}")
        assert list(stored) == ["album/0.png", "album/1.png", "album/2.png"]
        assert stored["album/2.png"] == contents(photos[2].image)

    def test_a_second_run_goes_on(self, tmp_path, suffix):
        first, photo = ShardSink(tmp_path, suffix, size=1), read("a.png")
        first.write(photo, photo.image)
        (tmp_path / f".00001{suffix}.999999999.tmp").write_bytes(b"half")
        second, other = ShardSink(tmp_path, suffix, size=1), read("b.png", 1)
        assert second.holds(photo.item) and not second.holds(other.item)
        second.write(other, other.image)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"00000{suffix}", f"00001{suffix}"]

    def test_formats_that_cannot_be_written(self, tmp_path, suffix):
        with pytest.raises(ValueError, match=r"suffix '.xyz'"):
            ShardSink(tmp_path, suffix, size=2).check(read("a.xyz"))

    def test_two_photos_of_one_name_are_an_error_of_the_second(self, tmp_path, suffix):
        sink = ShardSink(tmp_path, suffix, size=2)
        sink.check(read("a.png"))
        with pytest.raises(ValueError, match=r"two photos of the name a\.png"):
            sink.check(read("a.png"))
