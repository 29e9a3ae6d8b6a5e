"""What the demo does behind the page."""

import base64
import io
import shlex
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffusers_moebius.demo import inpainting
from diffusers_moebius.demo.examples import EXAMPLES
from diffusers_moebius.demo.handlers import Demo, context_pixels, friendly, number
from diffusers_moebius.demo.inpainting import Settings, Step, clean_latents, generate
from diffusers_moebius.demo.models import NANO, ModelShelf, parse_repository
from diffusers_moebius.demo.photos import VIEW_SIDE, Photo, VisitorError, open_photo, painted_mask
from diffusers_moebius.demo.selection import ObjectSelector, snap_to_edges
from diffusers_moebius.demo.session import Session, Version
from diffusers_moebius.pictures.files import ImageMetadata


@pytest.fixture
def demo(pipeline_folder, selector_folder):
    return Demo(str(pipeline_folder), str(selector_folder))


@pytest.fixture
def session(demo, photo):
    session = Session(open_photo(photo))
    yield session
    session.close()


@pytest.fixture
def hole():
    values = np.zeros((200, 300), bool)
    values[80:120, 130:190] = True
    return values


def painted(mask):
    """What the editor makes of a mask: a PNG whose opaque pixels are marked."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (255, 64, 64, 255)
    file = io.BytesIO()
    Image.fromarray(layer).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def region_of(told):
    """The mask that the editor is told to add."""
    with Image.open(io.BytesIO(base64.b64decode(told["mask"].partition(",")[2]))) as image:
        return np.asarray(image.convert("L")) > 0


def latest(session):
    return session.versions[max(session.versions)].photo


def run(demo, session, mask, version=None, **options):
    options = {"model": demo.shelf.default, "steps": 6, "seed": 3, "edge_margin": 0, **options}
    session.begin_run()
    return demo.run(session, version or min(session.versions), mask, **options)


def test_a_run_shows_steps_and_previews_and_keeps_the_rest(demo, session, hole):
    messages = list(run(demo, session, hole))
    steps = [value for kind, value in messages if kind == "step"]
    assert [step.number for step, _ in steps] == list(range(1, 6))  # strength 0.99 of 6 steps
    assert {step.total for step, _ in steps} == {5}
    assert all(left >= 0 for _, left in steps) and steps[-1][1] == 0
    previews = [step.preview for step, _ in steps if step.preview is not None]
    assert previews and all(preview.size == (300, 200) for preview in previews)
    assert messages[-1][0] == "done"
    before, after = (np.asarray(version.photo.image) for version in session.versions.values())
    assert (before[~hole] == after[~hole]).all() and (before[hole] != after[hole]).any()
    for preview in previews:
        assert (np.asarray(preview)[~hole] == before[~hole]).all()


def test_a_seed_gives_the_same_picture_again(demo, session, hole):
    results = []
    for seed in (3, 3, 4):
        list(run(demo, session, hole, seed=seed))
        results.append(np.asarray(latest(session).image))
    assert (results[0] == results[1]).all() and (results[0] != results[2]).any()


def test_the_command_is_one_that_the_command_line_takes(demo, session, hole, photo, tmp_path, pipeline_folder):
    from diffusers_moebius.cli import main

    _, (result,) = list(run(demo, session, hole, edge_margin=3, guidance=1.5))[-1]
    output = tmp_path / "again.png"
    mask_file = str(demo.write(session, result, "mask"))
    words = {"PHOTO": str(photo), "FOLDER": str(pipeline_folder), "my photo-moebius.png": str(output)}
    words["my photo-mask.png"] = mask_file
    arguments = [words.get(word, word) for word in shlex.split(session.version(result).settings.command("my photo"))]
    with pytest.raises(SystemExit) as caught:
        main([*arguments[1:], "--device", "cpu"])
    assert caught.value.code == 0
    assert (np.asarray(Image.open(output)) == np.asarray(latest(session).image)).all()


def test_stop_ends_one_run_and_no_other(demo, session, photo, hole):
    other = Session(open_photo(photo))
    finished = threading.Thread(target=lambda: list(run(demo, other, hole, steps=12)))
    messages = []
    for kind, value in run(demo, session, hole, steps=100):
        messages.append((kind, value))
        if kind == "step" and value[0].number == 2:
            finished.start()
            session.stop()
    finished.join()
    assert len(session.versions) == 1
    assert [kind for kind, _ in messages].count("step") < 10
    assert len(other.versions) == 2
    other.close()


def test_an_abandoned_run_stops(demo, session, hole):
    before = set(threading.enumerate())
    messages = run(demo, session, hole, steps=100)
    for kind, _ in messages:
        if kind == "step":
            break
    messages.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_a_run_that_is_stopped_while_it_waits_does_not_begin(demo, session, hole):
    waiting = run(demo, session, hole)
    session.stop()
    assert list(waiting) == [] and len(session.versions) == 1


def test_a_run_that_follows_is_not_stopped_by_the_stop_before(demo, session, hole):
    session.stop()
    assert list(run(demo, session, hole))[-1][0] == "done"


def test_nothing_of_a_session_is_left(photo, demo, hole):
    session = Session(open_photo(photo))
    _, (result,) = list(run(demo, session, hole))[-1]
    assert demo.write(session, result, "PNG").exists()
    session.close()
    assert not session.folder.exists() and not session.versions
    session.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"steps": 2.5}, "whole number"),
        ({"guidance": -1}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"seed": "many"}, "seed must be a whole number from 0 to 4294967295, but is 'many'"),
        ({"detail": "more"}, "detail"),
        ({"context": 10**6}, "surroundings"),
        ({"edge_margin": 10**6}, "edge margin"),
        ({"count": 5}, "candidates"),
        ({"version": 99}, "no longer kept"),
    ],
)
def test_settings_out_of_range_are_refused(demo, session, hole, options, message):
    with pytest.raises(VisitorError, match=message):
        list(run(demo, session, hole, **options))


def test_an_empty_mask_is_refused(demo, session, hole):
    with pytest.raises(VisitorError, match="Nothing is marked"):
        list(run(demo, session, np.zeros_like(hole)))


def test_errors_of_the_pipeline_reach_the_visitor(demo, session, hole, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("`image` is not to its taste.")

    monkeypatch.setattr(inpainting.MoebiusInpaintPipeline, "__call__", fail)
    with pytest.raises(VisitorError, match="not to its taste"):
        list(run(demo, session, hole))


def test_unexpected_errors_tell_nothing():
    import gradio as gr

    with pytest.raises(gr.Error) as caught, friendly():
        raise OSError("/home/someone/secret.txt is missing")
    assert "secret" not in str(caught.value)


def test_clean_latents_are_those_that_a_step_aims_at():
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for index in (0, 9, 19):
        timestep = scheduler.timesteps[index]
        output = scheduler.step(noise, timestep, latents)
        clean = clean_latents(scheduler, 20, int(timestep), latents, output.prev_sample)
        torch.testing.assert_close(clean, output.pred_original_sample, rtol=1e-3, atol=1e-3)


def test_generate_yields_the_photo_in_its_own_mode(demo, photo, hole, tmp_path):
    image = Image.open(photo).convert("LA")
    settings = Settings(demo.shelf.resolve(demo.shelf.default), 6, None, 3, 0, 32, False)
    outputs = list(generate(Photo(image, ImageMetadata(), "grey"), hole, settings, str(tmp_path / "stop")))
    assert isinstance(outputs[0], Step)
    assert (outputs[-1].mode, outputs[-1].size) == ("LA", image.size)


def test_models_are_named_without_places(pipeline_folder):
    shelf = ModelShelf(str(pipeline_folder))
    assert shelf.default == "tiny (of this server)"
    assert not any("secret-place" in name for name in shelf.sources)
    assert shelf.get(shelf.resolve(shelf.default)) is shelf.get(shelf.resolve(shelf.default))
    assert ModelShelf("hustvl/Moebius/ft_ffhq").default == "Moebius FFHQ (portraits)"
    assert ModelShelf("somebody/moebius-cats").default == "somebody/moebius-cats"
    assert ModelShelf().default == NANO


@pytest.mark.parametrize(
    "text", ["", "nano", "/etc/passwd", "../../secret", "a/../b", "C:\\x", "a/b/c/d", "https://x.y/z", "a b/c"]
)
def test_visitors_name_repositories_only(text):
    with pytest.raises(VisitorError):
        parse_repository(text)
    with pytest.raises(VisitorError):
        ModelShelf().resolve(text)


def test_a_folder_of_the_server_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "own" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VisitorError):
        parse_repository("own/model")
    assert parse_repository("own/other/ft_x") == ("own/other", "ft_x")


def test_a_model_that_does_not_load_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    shelf = ModelShelf(str(tmp_path / "empty"))
    with pytest.raises(VisitorError, match="could not be loaded") as caught:
        shelf.get(shelf.resolve(shelf.default))
    assert str(tmp_path) not in str(caught.value)


def test_a_click_selects_and_names_what_is_to_be_done(demo, session):
    request = {"photo": min(session.versions), "point": [100, 50], "scribble": None, "erase": True}
    told = demo.select(session, request)
    view = session.version(request["photo"]).photo.view
    alone = demo.selector.select(demo.selector.embed(view), view.size, (100, 50))
    assert told["erase"]
    assert (region_of(told) == alone).all() and alone.any()


def test_a_scribble_snaps_to_the_object():
    view = np.full((200, 300, 3), 90, np.uint8)
    view[60:140, 100:200] = (200, 40, 40)
    truth = np.zeros((200, 300), bool)
    truth[60:140, 100:200] = True
    noise = np.random.default_rng(0).integers(-12, 12, view.shape)
    image = Image.fromarray((view + noise).clip(0, 255).astype(np.uint8))
    scribble = np.zeros_like(truth)
    scribble[85:115, 90:190] = True  # a stroke that leaves the object at one side
    loop = np.zeros_like(truth)
    loop[50:150, 90:210] = True
    loop[54:146, 94:206] = False
    for drawn in (scribble, loop):
        found = snap_to_edges(image, drawn)
        assert (found & truth).sum() / (found | truth).sum() > 0.9
    empty = np.zeros_like(truth)
    assert not snap_to_edges(image, empty).any()


def test_a_mask_that_does_not_arrive_whole_is_refused(hole):
    url = painted(hole)
    assert (painted_mask(url, (300, 200)) == hole).all()
    assert not painted_mask(None, (300, 200)).any()
    for broken in (url[:200], "data:image/png;base64,AAAA", "nothing"):
        with pytest.raises(VisitorError, match="did not arrive"):
            painted_mask(broken, (300, 200))
    with pytest.raises(VisitorError, match="did not arrive"):
        painted_mask(url, (30, 20))


def test_candidates_have_seeds_that_follow_each_other(demo, session, hole):
    messages = list(run(demo, session, hole, count=2))
    steps = [value[0] for kind, value in messages if kind == "step"]
    assert [step.number for step in steps] == list(range(1, 11)) and {step.total for step in steps} == {10}
    ids = messages[-1][1]
    assert [session.version(k).settings.seed for k in ids] == [3, 4]
    pictures = [np.asarray(session.version(k).photo.image) for k in ids]
    assert (pictures[0] != pictures[1]).any()


def test_the_next_removal_goes_on_from_any_version(demo, session, hole):
    _, (first,) = list(run(demo, session, hole))[-1]
    other = np.zeros_like(hole)
    other[10:50, 10:60] = True
    list(run(demo, session, other, version=first))
    start, one, two = (np.asarray(version.photo.image) for version in session.versions.values())
    assert (
        (one[~hole] == start[~hole]).all() and (two[~other] == one[~other]).all() and (two[other] != one[other]).any()
    )
    _, (instead,) = list(run(demo, session, other))[-1]  # from the photo as it came: the first removal was undone
    assert (np.asarray(session.version(instead).photo.image)[~other] == start[~other]).all()


def test_the_oldest_removals_are_let_go_when_all_are_too_large(demo, session, monkeypatch):
    monkeypatch.setattr("diffusers_moebius.demo.session.MAX_KEPT_MEGAPIXELS", 0.2)
    first = min(session.versions)
    ids = [session.keep(Version(session.version(first).photo)) for _ in range(4)]
    assert list(session.versions) == [first, *ids[-2:]]
    with pytest.raises(VisitorError, match="no longer kept"):
        session.version(ids[0])


def test_files_of_any_version(demo, session, hole):
    first = min(session.versions)
    _, (result,) = list(run(demo, session, hole, edge_margin=2))[-1]
    for version in (first, result):
        with Image.open(demo.write(session, version, "PNG")) as image:
            assert (np.asarray(image) == np.asarray(session.version(version).photo.image)).all()
    with Image.open(demo.write(session, result, "mask")) as image:
        assert (np.asarray(image) == hole).all()
    with pytest.raises(VisitorError, match="no mask"):
        demo.write(session, first, "mask")


def test_a_view_keeps_transparency(photo, tmp_path):
    image = Image.open(photo).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = tmp_path / "transparent.png"
    image.save(path)
    assert open_photo(path).view.mode == "RGBA"


@pytest.mark.parametrize(("text", "value"), [("", None), (None, None), (" 2,5 ", 2.5), ("20", 20), (3, 3)])
def test_numbers_that_visitors_type(text, value):
    assert number("guidance", text, 0, 20, whole=False) == value


@pytest.mark.parametrize("text", ["many", "nan", "inf", "2.5", "-1"])
def test_what_is_no_such_number_is_named(text):
    with pytest.raises(VisitorError, match=f"steps must be a whole number from 0 to 9, but is '{text}'"):
        number("steps", text, 0, 9)


def test_a_selector_without_a_hub_says_so_at_once(session, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("diffusers_moebius.demo.selection.HfApi.model_info", fail)
    selector = ObjectSelector("somebody/no-such-model")
    assert selector.megabytes == float("inf")
    with pytest.raises(VisitorError, match="Scribble"):
        selector.embed(session.version(min(session.versions)).photo.view)


def test_a_broken_selector_says_so_and_names_no_place(tmp_path, session):
    selector = ObjectSelector(str(tmp_path))
    for _ in range(2):
        with pytest.raises(VisitorError) as caught:
            selector.embed(session.version(min(session.versions)).photo.view)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_examples_have_masks(example):
    pytest.importorskip("skimage")
    photo, mask = example.load()
    assert mask.shape == (photo.image.height, photo.image.width)
    assert 0.01 < mask.mean() < 0.3
    assert example.load()[0] is photo


def test_a_large_photo_is_viewed_small_and_filled_large(demo, phone_photo):
    session, told = demo.open(open_photo(phone_photo))
    width, height = told["size"]
    assert max(width, height) == VIEW_SIDE
    mask = np.zeros((height, width), bool)
    mask[600:640, 400:460] = True
    list(run(demo, session, mask, steps=2, context=20))
    before, after = (np.asarray(version.photo.image) for version in session.versions.values())
    assert before.shape == after.shape == (4000, 3000, 3)
    rows, columns = np.nonzero((before != after).any(axis=2))
    assert rows.min() >= 1870 and rows.max() <= 2005 and columns.min() >= 1245 and columns.max() <= 1442
    session.close()


def test_select_says_what_a_first_click_would_download(pipeline_folder, monkeypatch):
    from types import SimpleNamespace

    files = [SimpleNamespace(rfilename="model.safetensors", size=156_000_000)]
    monkeypatch.setattr(
        "diffusers_moebius.demo.selection.HfApi.model_info", lambda *args, **kwargs: SimpleNamespace(siblings=files)
    )
    assert "156 MB" in ObjectSelector("somebody/sam").hint
    assert "MB" not in ObjectSelector(str(pipeline_folder)).hint  # a folder is here already


def test_a_port_in_use_is_named(demo_url):
    from diffusers_moebius.demo import launch_demo

    with pytest.raises(ValueError, match="--port"):
        launch_demo(host="127.0.0.1", port=int(demo_url.rstrip("/").rpartition(":")[2]), quiet=True)


def test_by_default_the_mask_grows_over_what_is_left_of_an_object(demo, session, hole):
    session.version(1).photo.image.paste("white", (128, 78, 192, 122))
    _, (result,) = list(run(demo, session, hole, edge_margin=None))[-1]
    assert "--mask-dilation" not in session.version(result).settings.command("photo")
    before, after = (np.asarray(version.photo.image) for version in session.versions.values())
    rows = np.flatnonzero((before != after).any(axis=(1, 2)))
    assert (rows.min(), rows.max()) == (78, 121)


def test_context_follows_the_mask():
    mask = np.zeros((600, 800), bool)
    mask[100:200, 50:450] = True
    assert context_pixels(mask, 50) == 200
    assert context_pixels(mask, 0) == 32


def test_a_view_is_made_once(photo):
    opened = open_photo(photo)
    assert opened.view is opened.view


def test_a_closed_session_ends_its_run_and_keeps_nothing(demo, session, hole):
    for kind, _ in run(demo, session, hole, steps=100):
        if kind == "step":
            session.close()
    assert not session.versions and not session.folder.exists()
