"""What the demo does behind the page."""

import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffusers_moebius.demo import inpainting
from diffusers_moebius.demo.examples import EXAMPLES
from diffusers_moebius.demo.inpainting import Settings, Step, clean_latents, generate
from diffusers_moebius.demo.interface import Demo, _friendly, parse_number
from diffusers_moebius.demo.models import NANO, OWN, ModelShelf, parse_repository
from diffusers_moebius.demo.photos import VIEW_SIDE, VisitorError, open_photo
from diffusers_moebius.demo.selection import ObjectSelector, SelectionUnavailable
from diffusers_moebius.demo.session import REDRAW_SECONDS, Session

SETTINGS = Settings(steps=6, guidance=None, seed=3, context=32, color_compensation=False)


@pytest.fixture
def demo(pipeline_folder, selector_folder):
    return Demo(str(pipeline_folder), str(selector_folder))


@pytest.fixture
def session(photo):
    session = Session()
    session.open(open_photo(photo))
    yield session
    session.close()


@pytest.fixture
def hole():
    values = np.zeros((200, 300), bool)
    values[80:120, 130:190] = True
    return values


def run(demo, session, mask, **options):
    options = {
        "steps": 6,
        "guidance": None,
        "seed": 3,
        "context": 50,
        "color_compensation": False,
        "edge_margin": 0,
        **options,
    }
    return demo.run(session, mask, demo.shelf.default, "", **options)


def test_a_run_shows_steps_and_previews_and_keeps_the_rest(demo, session, hole):
    messages = list(run(demo, session, hole))
    steps = [value for kind, value in messages if kind == "step"]
    assert [step.number for step, _ in steps] == list(range(1, 6))  # strength 0.99 of 6 steps
    assert {step.total for step, _ in steps} == {5}
    assert all(left >= 0 for _, left in steps) and steps[-1][1] == 0
    previews = [step.preview for step, _ in steps if step.preview is not None]
    assert previews and all(preview.size == session.view.size for preview in previews)
    assert messages[-1][0] == "done"
    before, after = np.asarray(session.photo.image), np.asarray(session.result.image)
    assert (before[~hole] == after[~hole]).all() and (before[hole] != after[hole]).any()
    for preview in previews:
        assert (np.asarray(preview)[~hole] == before[~hole]).all()


def test_a_seed_gives_the_same_picture_again(demo, session, hole):
    results = []
    for seed in (3, 3, 4):
        list(run(demo, session, hole, seed=seed))
        results.append(np.asarray(session.result.image))
    assert (results[0] == results[1]).all() and (results[0] != results[2]).any()


def test_the_command_is_one_that_the_command_line_takes(demo, session, hole, photo, mask, tmp_path, pipeline_folder):
    from diffusers_moebius.cli import main

    _, (_, command) = list(run(demo, session, hole, edge_margin=3, guidance=1.5))[-1]
    output = tmp_path / "again.png"
    words = {"PHOTO": str(photo), "MASK": str(mask), "RESULT": str(output), "FOLDER": str(pipeline_folder)}
    arguments = [words.get(word, word) for word in command.split()[1:]]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--device", "cpu"])
    assert caught.value.code == 0
    assert (np.asarray(Image.open(output)) == np.asarray(session.result.image)).all()


def test_stop_ends_one_run_and_no_other(demo, session, photo, hole):
    other = Session()
    other.open(open_photo(photo))
    finished = threading.Thread(target=lambda: list(run(demo, other, hole, steps=12)))
    messages = []
    for kind, value in run(demo, session, hole, steps=100):
        messages.append((kind, value))
        if kind == "step" and value[0].number == 2:
            finished.start()
            session.stop()
    finished.join()
    assert session.result is None
    assert [kind for kind, _ in messages].count("step") < 10
    assert other.result is not None
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


def test_a_run_that_follows_is_not_stopped_by_the_stop_before(demo, session, hole):
    session.stop()
    assert list(run(demo, session, hole))[-1][0] == "done"


def test_nothing_of_a_session_is_left(photo, demo, hole):
    session = Session()
    session.open(open_photo(photo))
    list(run(demo, session, hole))
    session.close()
    assert not session.folder.exists()
    session.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"steps": 2.5}, "whole number"),
        ({"guidance": -1}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"context": 10**6}, "surroundings"),
        ({"edge_margin": 10**6}, "edge margin"),
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

    def fail():
        raise OSError("/home/someone/secret.txt is missing")

    with pytest.raises(gr.Error) as caught:
        _friendly(fail)()
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
    source = demo.shelf.resolve(demo.shelf.default)
    image = Image.open(photo).convert("LA")
    outputs = list(generate(source, image, hole, image.convert("RGB"), SETTINGS, str(tmp_path / "stop")))
    assert isinstance(outputs[0], Step)
    assert (outputs[-1].mode, outputs[-1].size) == ("LA", image.size)


def test_models_are_named_without_places(pipeline_folder):
    shelf = ModelShelf(str(pipeline_folder))
    assert shelf.default == "tiny (of this server)"
    assert not any("secret-place" in name for name in shelf.names)
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
        ModelShelf().resolve(OWN, text)


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


def test_clicks_add_and_take_away(demo, session):
    point = (100, 50)
    alone = demo.selector.select(demo.selector.embed(session.view), session.view.size, point)
    assert alone.shape == (200, 300) and alone.dtype == bool
    session.mask[:, :5] = True
    added = demo.click(session, point, remove=False, grow=0)
    assert (added == (alone | added)).all() and added[:, :5].all()
    grown = demo.click(session, point, remove=False, grow=4).copy()
    assert grown.sum() >= added.sum()
    removed = demo.click(session, point, remove=True, grow=4)
    assert not (removed & alone).any()


def test_brush_and_clicks_share_one_mask(demo, session):
    layer = np.zeros((200, 300, 4), np.uint8)
    layer[10:20, 10:20] = 255
    editor = {"background": np.zeros((200, 300, 4), np.uint8), "layers": [layer], "composite": None}
    assert demo.current_mask(session, editor).sum() == 100
    assert session.mask.sum() == 100
    assert demo.current_mask(session, None).sum() == 100


def test_out_of_sight_the_editor_does_not_count(demo, session):
    editor = {"background": np.zeros((200, 300, 4), np.uint8), "layers": [], "composite": None}
    session.mask[:, :5] = True
    session.in_editor = False
    assert demo.current_mask(session, editor).sum() == 1000
    session.in_editor = True
    assert not demo.current_mask(session, editor).any()


def test_an_editor_that_is_drawn_late_takes_no_mark_back(demo, session, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def editor(mask):
        layer = np.zeros((200, 300, 4), np.uint8)
        layer[mask] = 255
        return {"background": np.zeros((200, 300, 4), np.uint8), "layers": [layer], "composite": None}

    def mark(row):
        session.mask = session.mask.copy()
        session.mask[row] = True
        return session.to_editor()

    nothing = session.to_editor()
    first, second = mark(10), mark(20)
    for late in (nothing, first):
        assert demo.current_mask(session, editor(late)).sum() == 600
    painted = second.copy()
    painted[30] = True
    assert demo.current_mask(session, editor(painted)).sum() == 900
    now += REDRAW_SECONDS + 0.1
    assert demo.current_mask(session, editor(nothing)).sum() == 0  # all was erased since


def test_rectangles_in_percent(demo, session):
    assert demo.box(session, (10, 20, 30, 40)) == (30, 40, 120, 120)
    assert demo.box(session, (90, 90, 50, 50)) == (270, 180, 300, 200)
    for rectangle, message in (
        ((10, 20, 0, 40), "nothing in this"),
        ((100, 20, 30, 40), "nothing in this"),
        ((-1, 20, 30, 40), "left"),
        ((1, 20, 30, None), "height"),
    ):
        with pytest.raises(VisitorError, match=message):
            demo.box(session, rectangle)


@pytest.mark.parametrize(("text", "value"), [("", None), (None, None), (" 2,5 ", 2.5), ("20", 20)])
def test_numbers_that_visitors_type(text, value):
    assert parse_number("steps", text) == value


def test_what_is_no_number_is_named():
    with pytest.raises(VisitorError, match="steps must be a number, but is 'many'"):
        parse_number("steps", "many")


def test_a_selector_that_does_not_load_says_so_at_once_the_second_time(tmp_path, session, monkeypatch):
    calls = []

    def fail(source):
        calls.append(source)
        raise OSError(f"{tmp_path} is no model")

    import transformers

    monkeypatch.setattr(transformers.Sam2Model, "from_pretrained", fail)
    selector = ObjectSelector(str(tmp_path))
    for _ in range(2):
        with pytest.raises(SelectionUnavailable, match="brush works") as caught:
            selector.embed(session.view)
        assert str(tmp_path) not in str(caught.value)
    assert len(calls) == 1


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_examples_have_masks(example):
    pytest.importorskip("skimage")
    photo, mask = example.load()
    assert mask.shape == (photo.image.height, photo.image.width)
    assert 0.01 < mask.mean() < 0.3
    assert example.load()[0] is photo


def test_a_large_photo_is_viewed_small_and_filled_large(demo, phone_photo):
    session = Session()
    session.open(open_photo(phone_photo))
    assert max(session.view.size) == VIEW_SIDE
    mask = np.zeros((session.view.height, session.view.width), bool)
    mask[600:640, 400:460] = True
    list(run(demo, session, mask, steps=2, context=20))
    before, after = np.asarray(session.photo.image), np.asarray(session.result.image)
    assert before.shape == after.shape == (4000, 3000, 3)
    rows, columns = np.nonzero((before != after).any(axis=2))
    assert rows.min() >= 1870 and rows.max() <= 2005 and columns.min() >= 1245 and columns.max() <= 1442
    session.close()
