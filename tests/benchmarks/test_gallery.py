import json
import shutil

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def gallery(import_script):
    return import_script("gallery")


@pytest.fixture
def results(tmp_path):
    """A run on seven photos: telea is the better, the larger the photo's number."""
    pictures = []
    for number in range(7):
        for name, value in (("photo", 200), ("input", 128), ("telea", 30 * number)):
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            picture = np.full((40, 60, 3), value, np.uint8)
            Image.fromarray(picture).save(tmp_path / "pictures" / name / f"<{number}>.png")
        scores = {"telea": {"psnr": 10.0 + number, "lpips_hole": 0.9 - 0.1 * number}}
        pictures.append({"index": number, "name": f"<{number}>", "mask_area": 0.25, "scores": scores})
    report = {
        "protocol": "custom",
        "settings": {"output": str(tmp_path / "pictures")},
        "means": {"all": {"scores": {"telea": {"psnr": 13.0, "lpips_hole": 0.6}}}},
        "pictures": pictures,
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


@pytest.mark.parametrize("metric", ["psnr", "lpips_hole"])
def test_best_median_and_worst(gallery, results, metric):
    pictures = json.loads((results / "report.json").read_text())["pictures"]
    groups = gallery.ranked(pictures, "telea", metric, 2)
    names = {title: [picture["index"] for picture in group] for title, group in groups.items()}
    assert names == {"Best": [6, 5], "Median": [3, 2], "Worst": [1, 0]}
    many = gallery.ranked(pictures, "telea", metric, 5)  # no picture twice
    assert sorted(picture["index"] for group in many.values() for picture in group) == [0, 1, 2, 3, 5, 6]
    assert list(gallery.ranked(pictures[:2], "telea", metric, 5)) == ["All"]


def test_bad_input_is_named(gallery, results, tmp_path):
    with pytest.raises(ValueError, match="`results`"):
        gallery.main([str(tmp_path / "absent")])
    with pytest.raises(ValueError, match="`--metric`"):
        gallery.main([str(results), "--metric", "ssim", "-o", str(tmp_path / "page.html")])
    (results / "pictures" / "telea" / "<6>.png").unlink()
    with pytest.raises(ValueError, match="`--output`"):
        gallery.main([str(results), "-o", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_the_page_in_a_browser(browser, gallery, results, tmp_path):
    gallery.main([str(results), "--count", "1", "-o", str(tmp_path / "page.html")])
    shutil.rmtree(results / "pictures")
    page = browser.new_page()
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    assert [heading.inner_text() for heading in page.locator("h3").all()] == ["Best", "Median", "Worst"]
    assert "<6>" in page.locator("figure").first.inner_text()
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth === 60)")
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]

    def colour(x):  # of the first slider, at a share of its width
        box = page.locator(".slider").first.bounding_box()
        clip = {"x": box["x"] + x * box["width"], "y": box["y"] + 0.3 * box["height"], "width": 1, "height": 1}
        picture = tmp_path / "pixel.png"
        page.screenshot(path=picture, clip=clip)
        return np.asarray(Image.open(picture).convert("L"))[0, 0]

    assert abs(int(colour(0.25)) - 180) < 5 and abs(int(colour(0.75)) - 200) < 5
    slider = page.get_by_role("slider").first
    slider.focus()
    page.keyboard.press("Home")
    assert abs(int(colour(0.25)) - 200) < 5  # the photo alone
    slider.fill("100")
    assert abs(int(colour(0.75)) - 180) < 5
