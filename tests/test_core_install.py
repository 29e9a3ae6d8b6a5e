"""What `pip install diffusers-moebius` alone must do: transformers, peft and others come with extras."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

WITHOUT = ["transformers", "peft", "gradio", "datasets", "pyarrow", "pillow_heif", "cv2", "skimage", "scipy", "onnx"]
# One process for all, since importing torch takes longer than what is tested. A package that is None in `sys.modules`
# cannot be imported, as if it were not installed.
SCRIPT = """
import json, sys, traceback
sys.modules.update(dict.fromkeys({without}))
results = {{}}
for name, code in json.loads(sys.stdin.read()).items():
    names = {{}}
    try:
        exec(code, names)
        results[name] = names.get("result")
    except BaseException:
        results[name] = traceback.format_exc()
json.dump(results, open("results.json", "w"))
"""
SNIPPETS = {
    "command line": """
from PIL import Image
from diffusers_moebius.cli import main

Image.new("RGB", (40, 32), "teal").save("photo.png")
mask = Image.new("L", (40, 32))
mask.paste(255, (8, 8, 24, 24))
mask.save("mask.png")
try:
    main(["inpaint", "photo.png", "mask.png", "-o", "result.png", "--fast"])
except SystemExit as exit:
    result = exit.code
""",
    "pipeline": """
import torch
from diffusers_moebius import MoebiusInpaintPipeline, bundled_checkpoint

pipe = MoebiusInpaintPipeline.from_pretrained(bundled_checkpoint("nano")).prepare_for_inference()
picture, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
mask[..., 8:24, 8:24] = 1
result = list(pipe(image=picture, mask_image=mask, output_type="pt").images.shape)
""",
    "adapter": """
from diffusers_moebius import MoebiusInpaintPipeline, bundled_checkpoint

MoebiusInpaintPipeline.from_pretrained(bundled_checkpoint("nano")).load_lora_weights("adapter")
""",
    "phone photo": """
from diffusers_moebius.pictures.files import read_image

read_image(b"\\0\\0\\0\\x18ftypheic\\0\\0\\0\\0", "photo.heic")
""",
    "parquet": """
from pathlib import Path
from diffusers_moebius.batch.sources import find_photos

Path("photos.parquet").touch()
find_photos(Path("photos.parquet"), None)
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core")
    command = [sys.executable, "-c", SCRIPT.format(without=WITHOUT)]
    process = subprocess.run(command, input=json.dumps(SNIPPETS), cwd=folder, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_command_line_fills_a_photo(folder, results):
    assert results["command line"] == 0
    assert (folder / "result.png").is_file()


def test_the_pipeline_runs(results):
    assert results["pipeline"] == [1, 3, 32, 32]


@pytest.mark.parametrize(
    "name, words",
    [
        ("adapter", "ImportError: LoRA adapters need the package peft"),
        ("phone photo", "photo.heic is HEIC, which needs `pip install diffusers-moebius[heic]`"),
        ("parquet", "Parquet needs `pip install diffusers-moebius[parquet]`"),
    ],
)
def test_what_needs_an_extra_says_so(results, name, words):
    assert words in results[name]
