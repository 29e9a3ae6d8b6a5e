"""Where photos and masks are found."""

import pytest
from photo_files import contents, mask_image, photo_image, write_tar
from PIL import Image

from diffusers_moebius.batch.sources import find_photos

MASK = contents(mask_image())


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


class TestFolders:
    def test_masks_are_those_of_the_same_name(self, tmp_path):
        touch(tmp_path / "photos", "b.jpg", "a.PNG", "lonely.webp", "double.png", "c.heic", "notes.txt", ".hidden.png")
        touch(tmp_path / "masks", "a.png", "b.png", "b.jpg", "double.gif", "double.tif", "c.png")
        source = find_photos(tmp_path / "photos", tmp_path / "masks")
        found = {item.key: sorted(path.name for path in item.masks) for item in source.items}
        assert found == {
            "a.PNG": ["a.png"],
            "b.jpg": ["b.jpg"],
            "c.heic": ["c.png"],
            "double.png": ["double.gif", "double.tif"],
            "lonely.webp": [],
        }
        assert source.total == 5 and source.left_out == ["notes.txt"] and not source.is_single

    def test_one_mask_for_all(self, tmp_path):
        touch(tmp_path, "photos/a.png", "photos/b.png", "mask.png")
        items = list(find_photos(tmp_path / "photos", tmp_path / "mask.png").items)
        assert [item.masks for item in items] == [[tmp_path / "mask.png"]] * 2

    def test_recursive(self, tmp_path):
        touch(tmp_path / "photos", "a.png", "album/a.png", "album/deep/b.png", "album/x.xmp", ".cache/c.png")
        touch(tmp_path / "masks", "a.png", "album/a.png", "deep/b.png")
        assert [item.key for item in find_photos(tmp_path / "photos", tmp_path / "masks").items] == ["a.png"]
        source = find_photos(tmp_path / "photos", tmp_path / "masks", recursive=True)
        found = {item.key: item.masks for item in source.items}
        masks = tmp_path / "masks"
        assert found == {
            "a.png": [masks / "a.png"],
            "album/a.png": [masks / "album" / "a.png"],
            "album/deep/b.png": [],
        }
        assert source.left_out == ["album/x.xmp"]

    def test_a_shard_beside_pictures_is_none(self, tmp_path):
        touch(tmp_path, "photos/a.png", "photos/backup.tar", "mask.png")
        source = find_photos(tmp_path / "photos", tmp_path / "mask.png")
        assert [item.key for item in source.items] == ["a.png"] and source.left_out == ["backup.tar"]

    def test_without_pictures(self, tmp_path):
        touch(tmp_path, "photos/notes.txt", "mask.png")
        with pytest.raises(ValueError, match="PHOTO must hold pictures"):
            find_photos(tmp_path / "photos", tmp_path / "mask.png")

    @pytest.mark.parametrize(
        "photo, mask", [("a.png", None), ("photos", None), ("a.png", "photos"), ("a.tar", "photos")]
    )
    def test_masks_that_do_not_fit(self, tmp_path, photo, mask):
        touch(tmp_path, "a.png", "a.tar", "photos/a.png")
        with pytest.raises(ValueError, match="MASK"):
            find_photos(tmp_path / photo, mask and tmp_path / mask)


class TestShards:
    def test_webdataset(self, tmp_path):
        photos = {name: contents(photo_image(seed)) for seed, name in enumerate(("a", "album/b", "c"))}
        files = {}
        for name, photo in photos.items():
            files |= {f"{name}.png": photo, f"{name}.json": b"{}", f"{name}.mask.png": MASK}
        files.pop("c.mask.png")
        write_tar(tmp_path / "0.tar", dict(list(files.items())[:3]))
        write_tar(tmp_path / "1.tar", dict(list(files.items())[3:]))
        items = list(find_photos(tmp_path, None).items)
        assert [(item.key, item.photo) for item in items] == [(f"{name}.png", photo) for name, photo in photos.items()]
        assert [item.masks for item in items] == [[MASK], [MASK], []]
        shared = find_photos(tmp_path / "0.tar", tmp_path / "mask.png").items
        assert [item.masks for item in shared] == [[tmp_path / "mask.png"]]

    def test_parquet(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        jpeg, png = contents(photo_image(), "JPEG"), contents(photo_image())
        address = "https://example.org/d.jpg?size=large"
        images = [jpeg, png, b"text"], ["album/c.png", address], [{"bytes": png, "path": "x/e.png"}]
        masks = [MASK, None, MASK], ["masks/c.png", "m.png"], [{"bytes": MASK, "path": None}]
        for number, (image, mask) in enumerate(zip(images, masks)):
            write_table(pyarrow.table({"image": image, "mask": mask}), tmp_path / f"{number}.parquet")
        source = find_photos(tmp_path, None)
        items = {item.key: item for item in source.items}
        assert source.total == len(items) == 6
        assert list(items) == ["0-000000.jpg", "0-000001.png", "0-000002.png", "album/c.png", "d.jpg", "e.png"]
        assert items["0-000000.jpg"].photo == jpeg and items["0-000000.jpg"].masks == [MASK]
        assert items["0-000001.png"].masks == []
        assert items["album/c.png"].photo == tmp_path / "album" / "c.png"
        assert items["album/c.png"].masks == [tmp_path / "masks" / "c.png"]
        assert items["d.jpg"].photo == address
        assert (items["e.png"].photo, items["e.png"].masks) == (png, [MASK])

    def test_parquet_with_keys(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        table = {
            "key": ["one", "two.webp"],
            "image": [contents(photo_image(), "JPEG"), contents(photo_image(), "WEBP")],
        }
        write_table(pyarrow.table(table), tmp_path / "a.parquet")
        assert [item.key for item in find_photos(tmp_path / "a.parquet", None).items] == ["one.jpg", "two.webp"]

    @pytest.mark.parametrize("name, words", [("a.parquet", "Parquet file"), ("a.tar", "tar file")])
    def test_broken_shards(self, tmp_path, name, words):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        (tmp_path / name).write_bytes(b"Dear diary, " * 100)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a {words}"):
            list(find_photos(tmp_path / name, None).items)

    def test_parquet_without_pictures(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.table({"photo": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="must have a column `image`, but has photo"):
            find_photos(tmp_path / "a.parquet", None)


def test_contents_open_as_pictures(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": contents(photo_image())})
    (item,) = find_photos(tmp_path / "0.tar", tmp_path / "mask.png").items
    (tmp_path / "a.png").write_bytes(item.photo)
    assert Image.open(tmp_path / "a.png").size == photo_image().size
