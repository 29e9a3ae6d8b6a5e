"""The demo's API, by gradio's client."""

import time
from pathlib import Path

import numpy as np
import pytest
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image


@pytest.fixture(scope="module")
def client(demo_url):
    return Client(demo_url, verbose=False)


@pytest.fixture
def downloads(client, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "output_dir", str(tmp_path / "downloads"))


def predict(client, photo, mask, **kwargs):
    return client.predict(
        photo=handle_file(str(photo)), mask=handle_file(str(mask)), api_name="/predict", **{"steps": 4, **kwargs}
    )


def test_only_one_endpoint_is_public_and_it_is_documented(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/predict"]
    parameters = endpoints["/predict"]["parameters"]
    names = [parameter["parameter_name"] for parameter in parameters]
    assert names[:6] == ["photo", "mask", "model", "steps", "guidance", "seed"]
    assert all(parameter["label"] for parameter in parameters)
    assert "white" in endpoints["/predict"]["description"]


def test_predict_changes_the_mask_alone(client, downloads, photo, mask):
    path, settings = predict(client, photo, mask, seed=7, edge_margin=2)
    before, after, hole = (np.asarray(Image.open(p)) for p in (photo, path, mask))
    assert path.endswith(".png") and before.shape == after.shape
    changed = (before != after).any(axis=2)
    assert changed[hole > 0].mean() > 0.5
    assert not changed[:78].any() and not changed[122:].any()
    assert settings["seed"] == 7 and settings["steps"] == 4 and settings["edge_margin"] == 2


def test_predict_gives_jpeg_with_exif(client, downloads, tmp_path):
    exif = Image.Exif()
    exif[271] = "Camera maker"
    photo, mask = tmp_path / "p.jpg", tmp_path / "m.png"
    Image.new("RGB", (96, 64), (90, 120, 30)).save(photo, exif=exif)
    values = np.zeros((64, 96), np.uint8)
    values[20:40, 30:60] = 255
    Image.fromarray(values).save(mask)
    path, _ = predict(client, photo, mask, file_format="JPEG")
    with Image.open(path) as result:
        assert (result.format, result.size, result.getexif()[271]) == ("JPEG", (96, 64), "Camera maker")


def test_what_is_wrong_gives_an_error_and_the_next_call_works(client, downloads, photo, mask, tmp_path):
    bad, small, empty = tmp_path / "bad.png", tmp_path / "small.png", tmp_path / "empty.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("L", (20, 20), 255).save(small)
    Image.new("L", (300, 200)).save(empty)
    cases = [
        ((bad, mask, {}), "not a picture"),
        ((photo, bad, {}), "not a picture"),
        ((photo, small, {}), "same size"),
        ((photo, empty, {}), "Nothing is marked"),
        ((photo, mask, {"steps": 0}), "steps"),
        ((photo, mask, {"model": "../../etc"}), "not the name of a repository"),
        ((photo, mask, {"file_format": "EXE"}), "file_format"),
    ]
    for (first, second, options), message in cases:
        with pytest.raises(AppError, match=message) as caught:
            predict(client, first, second, **options)
        assert "/tmp" not in str(caught.value) and "secret-place" not in str(caught.value)
    assert predict(client, photo, mask)[0]


def test_uploads_are_deleted_after_use(client, downloads, photo, mask, monkeypatch):
    monkeypatch.setattr("diffusers_moebius.demo.session.UPLOAD_SECONDS", 0.5)
    folder = Path(get_upload_folder())
    before = set(folder.rglob("*.png"))
    predict(client, photo, mask)
    until = time.monotonic() + 20
    while {path.name for path in folder.rglob("*.png")} & {photo.name, mask.name} and time.monotonic() < until:
        time.sleep(0.1)
    assert [path.name for path in set(folder.rglob("*.png")) - before] in ([], ["holiday-moebius.png"])


def test_visitors_may_send_the_same_files_at_once(demo_url, tmp_path, photo, mask, monkeypatch):
    monkeypatch.setattr("diffusers_moebius.demo.session.UPLOAD_SECONDS", 30)
    clients = [Client(demo_url, verbose=False, download_files=str(tmp_path / name)) for name in "abc"]
    arguments = {"photo": handle_file(str(photo)), "mask": handle_file(str(mask)), "steps": 20, "seed": 3}
    jobs = [client.submit(api_name="/predict", **arguments) for client in clients]
    pictures = [Path(job.result(timeout=120)[0]).read_bytes() for job in jobs]
    assert len(set(pictures)) == 1
