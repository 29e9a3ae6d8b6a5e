"""Blind studies: made, answered and reported."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diffusers_moebius.evaluation.methods import make_method
from diffusers_moebius.evaluation.study import (
    Study,
    binomial_test,
    fleiss_kappa,
    key_path,
    make_study,
    photos_of,
    report_markdown,
    report_study,
    wilson_interval,
)

PEOPLE = [f"{number:016x}" for number in range(1, 5)]


def photos(count=5):
    generator = np.random.default_rng(0)
    for number in range(count):
        mask = np.zeros((40, 60), bool)
        mask[10:25, 20:40] = True
        yield f"photo-{number}", generator.integers(0, 256, (40, 60, 3), dtype=np.uint8), mask


def flat(value):
    return lambda blanked, mask, name, seed: np.full_like(blanked, value)


@pytest.fixture
def study(tmp_path):
    methods = {"dark": flat(10), "bright": flat(240), "mean": make_method("mean")}
    assert make_study(photos(), methods, tmp_path / "study") == 5
    return Study(tmp_path / "study")


def answer(study, person, favourite):
    key = json.loads(key_path(study.folder).read_text())
    for case in study.order(person):
        options = study.options(person, case)
        study.answer(person, case, next(name for name in options if key[name]["method"] == favourite), 1.5)


def test_pictures_change_in_the_hole_alone_and_tell_no_method(study):
    key = json.loads(key_path(study.folder).read_text())
    originals = {name: (photo, mask) for name, photo, mask in photos()}
    for case in study.cases.values():
        assert len(case["options"]) == 3
        for name in case["options"]:
            photo, mask = originals[key[name]["photo"]]
            picture = np.asarray(Image.open(study.folder / "pictures" / name))
            assert (picture[~mask] == photo[~mask]).all() and (picture[mask] != photo[mask]).any()
    shown = "".join(path.name for path in study.folder.rglob("*")) + (study.folder / "study.json").read_text()
    assert not any(name in shown for name in ("dark", "bright", "mean", "photo-0"))
    assert not key_path(study.folder).is_relative_to(study.folder)


def test_order_and_places_differ_from_person_to_person(study):
    assert len({tuple(study.order(person)) for person in PEOPLE}) > 1
    case = study.order(PEOPLE[0])[0]
    assert len({tuple(study.options(person, case)) for person in PEOPLE}) > 1
    assert study.options(PEOPLE[0], case) == study.options(PEOPLE[0], case)


def test_pairs_hold_each_two(tmp_path):
    methods = {"a": flat(1), "b": flat(2), "c": flat(3)}
    assert make_study(photos(2), methods, tmp_path / "pairs", layout="pairs") == 6
    assert all(len(case["options"]) == 2 for case in Study(tmp_path / "pairs").cases.values())


def test_a_report(study):
    for person in PEOPLE[:3]:
        answer(study, person, "bright")
    answer(study, PEOPLE[3], "dark")
    report = report_study(study)
    assert (report["people"], report["answers"]) == (4, 20)
    bright = report["methods"]["bright"]
    assert (bright["chosen"], bright["shown"], bright["share"]) == (15, 20, 0.75)
    expected = stats.binomtest(15, 20, 1 / 3)
    assert bright["wilson"] == pytest.approx(expected.proportion_ci(method="wilson"), abs=1e-6)
    assert bright["p"] == pytest.approx(expected.pvalue, rel=1e-6)
    assert bright["bootstrap"][0] < 0.75 < bright["bootstrap"][1] + 1e-9
    assert report["methods"]["mean"]["chosen"] == 0
    text = report_markdown(report)
    assert text.index("bright") < text.index("dark") < text.index("| mean") and "75.0 %" in text


def test_only_the_first_answer_of_a_case_counts_and_a_broken_line_does_not(study):
    person = PEOPLE[0]
    case = study.order(person)[0]
    first, second = study.options(person, case)[:2]
    study.answer(person, case, first, 1.0)
    study.answer(person, case, second, 1.0)
    with (study.folder / "answers" / f"{person}.jsonl").open("a") as file:
        file.write('{"case": "0002", "cho')
    assert [answer.choice for answer in study.answers()] == [first]


@pytest.mark.parametrize(("count", "total", "share"), [(0, 10, 0.25), (10, 10, 0.5), (7, 22, 0.25), (500, 1100, 0.4)])
def test_intervals_and_tests_are_those_of_scipy(count, total, share):
    expected = stats.binomtest(count, total, share)
    assert wilson_interval(count, total) == pytest.approx(expected.proportion_ci(method="wilson"), abs=1e-6)
    assert binomial_test(count, total, share) == pytest.approx(expected.pvalue, rel=1e-5)


def test_kappa_of_the_textbook():
    # Fleiss (1971), as in its often repeated example: 14 people, 10 subjects, 5 categories.
    table = np.array(
        [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ]
    )
    assert fleiss_kappa(table) == pytest.approx(0.2099, abs=1e-4)
    assert fleiss_kappa(np.array([[5, 0], [0, 5]])) == 1
    assert math.isnan(fleiss_kappa(np.array([[1, 0], [0, 1]])))


def test_photos_of_a_folder_and_masks_that_grow_as_the_papers(tmp_path):
    for number in range(12):
        Image.new("RGB", (600, 512)).save(tmp_path / f"{number:02d}.jpg")
        mask = np.zeros((512, 600), np.uint8)
        mask[200:210, 300:320] = 255
        Image.fromarray(mask).save(tmp_path / f"{number:02d}.mask.png")
    plain, grown, again = (list(photos_of(tmp_path, dilate=dilate)) for dilate in (False, True, True))
    assert [name for name, *_ in plain] == [f"{number:02d}" for number in range(12)]
    assert all(mask.sum() == 200 for *_, mask in plain)
    reach = [(int(mask.any(1).sum()) - 10) // 2 for *_, mask in grown]
    assert set(reach) <= {1, 2, 3, 4, 6} and len(set(reach)) > 2
    assert all((a == b).all() for (*_, a), (*_, b) in zip(grown, again))
    assert len(list(photos_of(tmp_path, limit=3))) == 3


def test_bad_input_is_named(study, tmp_path):
    methods = {"a": flat(1), "b": flat(2)}
    with pytest.raises(ValueError, match="`methods`"):
        make_study(photos(), {"a": flat(1)}, tmp_path / "new")
    with pytest.raises(ValueError, match="`layout`"):
        make_study(photos(), methods, tmp_path / "new", layout="columns")
    with pytest.raises(ValueError, match="exists"):
        make_study(photos(), methods, study.folder)
    with pytest.raises(ValueError, match="`photos`"):
        make_study([], methods, tmp_path / "none")
    with pytest.raises(ValueError, match="`folder`"):
        Study(tmp_path)
    with pytest.raises(ValueError, match="`person`"):
        study.answer("../../etc", "0001", study.cases["0001"]["options"][0], 1)
    with pytest.raises(ValueError, match="`choice`"):
        study.answer(PEOPLE[0], "0001", "key.json", 1)
    with pytest.raises(ValueError, match="Nobody"):
        report_study(study)
