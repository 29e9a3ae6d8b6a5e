"""Saved pipelines as Modular Diffusers reads them, with and without this package."""

import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import ModularPipeline
from PIL import Image

from diffusers_moebius import MoebiusAutoBlocks, MoebiusInpaintPipeline, MoebiusModularPipeline


def run_modular(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    rows, columns = np.mgrid[:64, :64].astype(np.uint8)
    photo = Image.fromarray(np.stack([rows * 3, columns * 3, rows + columns], -1))
    mask = (rows > 20) & (rows < 44) & (columns > 20) & (columns < 44)
    generator = torch.Generator().manual_seed(0)
    result = pipeline(image=photo, mask_image=mask, num_inference_steps=2, generator=generator, output="images")
    return np.asarray(result[0])


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    """A folder that is to become the repository somebody/inpaint, with defaults of its own."""
    pipeline = MoebiusInpaintPipeline.from_pipe(
        tiny_pipeline, default_guidance_scale=2.0, default_guidance_start=0.5, default_paste="seamless"
    )
    pipeline.save_pretrained(tmp_path / "saved", repo_id="somebody/inpaint")
    return tmp_path / "saved"


@pytest.fixture
def expected(tiny_pipeline, saved):
    return run_modular(MoebiusModularPipeline.from_pipe(MoebiusInpaintPipeline.from_pretrained(saved)))


def test_index_names_no_path_of_this_machine(saved):
    index = json.loads((saved / "modular_model_index.json").read_text())
    components = {name: value for name, value in index.items() if isinstance(value, list)}
    assert components.keys() == {"vae", "unet", "lcg_embedder", "scheduler", "guider"}
    for name, (library, class_name, spec) in components.items():
        assert spec["type_hint"] == [library, class_name] and spec["subfolder"] == name
        assert spec["pretrained_model_name_or_path"] == "somebody/inpaint"
    assert str(saved.parent) not in (saved / "modular_model_index.json").read_text()
    assert index["default_paste"] == "seamless" and index["_class_name"] == "ModularPipeline"


def test_generic_class_asks_for_trust(saved):
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipeline.from_pretrained(str(saved))


def test_the_package_s_class_needs_no_trust_and_saves_what_it_loads(saved, expected, tmp_path):
    pipeline = MoebiusModularPipeline.from_pretrained(saved)
    assert pipeline.guider.config.guidance_scale == 2.0 and pipeline.guider.config.start == 0.5
    np.testing.assert_array_equal(run_modular(pipeline), expected)
    pipeline.save_pretrained(tmp_path / "again")
    again = MoebiusInpaintPipeline.from_pretrained(tmp_path / "again")
    for name in ("guidance_scale", "guidance_start", "paste", "strength", "num_inference_steps"):
        assert (
            again.config[f"default_{name}"] == MoebiusInpaintPipeline.from_pretrained(saved).config[f"default_{name}"]
        )
    np.testing.assert_array_equal(run_modular(MoebiusModularPipeline.from_pipe(again)), expected)


def test_upload_names_the_repository(hub, saved):
    MoebiusModularPipeline.from_pretrained(saved).push_to_hub("somebody/modular", token="hf_secret")
    index = json.loads(hub.repositories["somebody/modular"].files("main")["modular_model_index.json"])
    assert index["unet"][2]["pretrained_model_name_or_path"] == "somebody/modular"


def test_blocks_find_their_components_in_a_folder(saved, expected):
    pipeline = MoebiusAutoBlocks().init_pipeline(str(saved))
    assert pipeline.unet is None
    pipeline.load_components()
    np.testing.assert_array_equal(run_modular(pipeline), expected)


WITHOUT_PACKAGE = """
import sys
sys.modules["diffusers_moebius"] = None  # makes every import of it fail
import numpy as np
from diffusers import ModularPipeline
exec(open(sys.argv[1]).read())
folder, output = sys.argv[2:]
results = []
for location in ("somebody/inpaint", folder, folder):
    pipeline = ModularPipeline.from_pretrained(location, trust_remote_code=True)
    pipeline.load_components()
    assert not pipeline.null_component_names, pipeline.null_component_names
    assert (pipeline.guider.config.guidance_scale, pipeline.guider.config.start) == (2.0, 0.5)
    results.append(run_modular(pipeline))
assert not [name for name in sys.modules if name.startswith("diffusers_moebius.")]
np.save(output, results)
"""


@pytest.mark.slow
def test_without_this_package(hub, saved, expected, tmp_path):
    hub.add("somebody/inpaint").add_folder(saved)
    script = tmp_path / "run.py"
    script.write_text("import numpy as np\nimport torch\nfrom PIL import Image\n" + inspect.getsource(run_modular))
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, script, saved, tmp_path / "results.npy"],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    for result in np.load(tmp_path / "results.npy"):
        np.testing.assert_array_equal(result, expected)
