"""A study's page in a real browser."""

import json

import numpy as np
import pytest

from diffusers_moebius.evaluation.study import Study, key_path, make_study, report_study

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow


def photos():
    for number in range(4):
        mask = np.zeros((60, 80), bool)
        mask[20:40, 30:50] = True
        yield f"photo-{number}", np.full((60, 80, 3), 40 * number, np.uint8), mask


def test_people_answer_go_on_later_and_see_no_names(browser, tmp_path):
    from diffusers_moebius.evaluation.study_page import serve_study

    methods = {
        name: lambda blanked, mask, _, seed, value=value: np.full_like(blanked, value)
        for name, value in (("telescope", 20), ("marmalade", 230), ("saxophone", 128))
    }
    make_study(photos(), methods, tmp_path / "study")
    study = Study(tmp_path / "study")
    url = serve_study(study, port=None, prevent_thread_lock=True, quiet=True)[1]
    key = json.loads(key_path(study.folder).read_text())
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)

    def wait_for(number):
        sync_api.expect(page.locator("#case")).to_contain_text(f"{number} of 4")

    page.goto(url)
    sync_api.expect(page.get_by_text("nothing about you")).to_be_visible()
    page.click("#start")
    wait_for(1)
    assert page.locator(".choices button").count() == 3
    content = page.content()
    assert not any(word in content for word in (*methods, "photo-0", str(tmp_path)))
    page.locator(".choices button").nth(0).click()
    wait_for(2)
    page.keyboard.press("2")
    wait_for(3)
    (person,) = (path.stem for path in (study.folder / "answers").iterdir())

    page.reload()  # the same person goes on
    page.click("#start")
    wait_for(3)
    for number in (3, 4):
        wait_for(number)
        page.keyboard.press("1")
    sync_api.expect(page.locator("#case")).to_contain_text("Thank you")

    answers = study.answered(person)
    places = [study.options(person, case).index(answers[case].choice) for case in study.order(person)]
    assert places == [0, 1, 0, 0] and all(answer.seconds > 0 for answer in answers.values())

    other = browser.new_context().new_page()  # another person
    other.goto(url)
    other.click("#start")
    sync_api.expect(other.locator("#case")).to_contain_text("1 of 4")
    other.keyboard.press("3")
    sync_api.expect(other.locator("#case")).to_contain_text("2 of 4")
    report = report_study(study)
    assert (report["people"], report["answers"]) == (2, 5)
    assert sum(row["chosen"] for row in report["methods"].values()) == 5
    assert {entry["method"] for entry in key.values()} == set(methods)
