"""The run over many photos."""

import threading

import numpy as np
import pytest
from photo_files import contents, mask_image, photo_image
from PIL import Image

from diffusers_moebius.batch.photo import Item, MaskOptions
from diffusers_moebius.batch.run import READ_AHEAD, inpaint_items
from diffusers_moebius.batch.sinks import FileSink, named_in

OPTIONS = {"num_inference_steps": 2, "padding_mask_crop": None}


def items(count, size=lambda number: (48, 40)):
    for number in range(count):
        side = size(number)
        yield Item(f"{number}.png", contents(photo_image(number, side)), [contents(mask_image(side))])


@pytest.fixture
def run(tiny_pipeline, tmp_path):
    """Runs photos into the folder `out`, by default with the tiny pipeline."""

    def start(photos, load=lambda: tiny_pipeline, folder="out", **options):
        sink = FileSink(named_in(tmp_path / folder))
        return inpaint_items(photos, sink, load, MaskOptions(), OPTIONS, **options)

    return start


def test_every_photo_once_and_in_order(run, tmp_path):
    outcomes = list(run(items(7)))
    assert [outcome.item.key for outcome in outcomes] == [f"{number}.png" for number in range(7)]
    assert [outcome.paths for outcome in outcomes] == [[tmp_path / "out" / f"{number}.png"] for number in range(7)]
    assert all(outcome.error is None and outcome.seconds > 0 for outcome in outcomes)


def test_batches_of_mixed_sizes_are_equal_to_single_runs(run, tmp_path, tiny_pipeline, monkeypatch):
    def size(number):
        return [(48, 40), (64, 96)][number % 3 == 0]

    assert not [outcome for outcome in run(items(9, size), folder="alone") if outcome.error]
    call, batches = type(tiny_pipeline).__call__, []

    def record(self, **arguments):
        batches.append({image.size for image in arguments["image"]})
        assert len(arguments["image"]) <= 2
        return call(self, **arguments)

    monkeypatch.setattr(type(tiny_pipeline), "__call__", record)
    outcomes = list(run(items(9, size), folder="together", batch_size=2))
    assert sorted(outcome.item.key for outcome in outcomes) == [f"{number}.png" for number in range(9)]
    assert len(batches) == 5 and all(len(sizes) == 1 for sizes in batches)
    for number in range(9):
        alone, together = (np.asarray(Image.open(tmp_path / f / f"{number}.png"), int) for f in ("alone", "together"))
        assert np.abs(alone - together).max() <= 1


def test_broken_photos_are_outcomes(run):
    photos = list(items(6))
    photos[1] = Item("1.png", b"text", photos[1].masks)
    photos[5] = Item("5.png", photos[5].photo, [])
    outcomes = {outcome.item.key: outcome.error for outcome in run(iter(photos))}
    assert len(outcomes) == 6
    assert {key for key, error in outcomes.items() if error} == {"1.png", "5.png"}
    assert "text" not in str(outcomes["1.png"]) and "not a picture" in str(outcomes["1.png"])


def test_the_first_photos_are_looked_at_before_the_model_is_loaded(run, tiny_pipeline):
    events = []

    def load():
        events.append("model")
        return tiny_pipeline

    photos = list(items(5))
    photos[2] = Item("2.png", b"text", photos[2].masks)
    for outcome in run(iter(photos), load):
        events.append(outcome.item.key)
    assert events == ["2.png", "model", "0.png", "1.png", "3.png", "4.png"]


def test_no_model_is_loaded_for_nothing(run):
    photos = [Item(f"{number}.png", b"text", [b"text"]) for number in range(9)]
    assert len(list(run(iter(photos), load=lambda: pytest.fail("a model was loaded")))) == 9


def test_photos_are_read_as_they_are_needed(run):
    taken = []

    def counted():
        for item in items(30):
            taken.append(item.key)
            yield item

    outcomes = run(counted())
    next(outcomes)
    assert len(taken) <= READ_AHEAD + 3
    outcomes.close()


def test_large_photos_are_read_one_ahead(run, tiny_pipeline, monkeypatch):
    monkeypatch.setattr("diffusers_moebius.batch.run.PIXELS_AT_ONCE", 48 * 40)
    taken = []

    def counted():
        for item in items(12):
            taken.append(item.key)
            yield item

    def load():
        assert len(taken) <= 2
        return tiny_pipeline

    ahead = [len(taken) - number for number, _ in enumerate(run(counted(), load), 1)]
    assert len(ahead) == 12 and max(ahead) <= 3  # and those that are being written


def test_a_stop_finishes_the_photo_at_hand_and_the_next_run_goes_on(run, tmp_path, tiny_pipeline, monkeypatch):
    call, stopped = type(tiny_pipeline).__call__, threading.Event()
    calls = []

    def stop_at_the_third(self, **arguments):
        calls.append(1)
        if len(calls) == 3:
            stopped.set()
        return call(self, **arguments)

    monkeypatch.setattr(type(tiny_pipeline), "__call__", stop_at_the_third)
    done = [outcome.item.key for outcome in run(items(6), is_stopped=stopped.is_set)]
    assert done == ["0.png", "1.png", "2.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == done


def test_errors_that_no_photo_causes_end_the_run(run, tiny_pipeline, monkeypatch):
    def broken(self, **arguments):
        raise AssertionError("a bug")

    monkeypatch.setattr(type(tiny_pipeline), "__call__", broken)
    with pytest.raises(AssertionError, match="a bug"):
        list(run(items(3)))


def test_outputs_that_cannot_be_written_are_outcomes(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    outcomes = list(run(items(2)))
    assert len(outcomes) == 2 and all("is a file" in str(outcome.error) for outcome in outcomes)
