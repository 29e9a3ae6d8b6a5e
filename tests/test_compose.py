"""The code of docs/compose.md."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines import components_manager
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from diffusers_moebius import MoebiusInpaintPipeline, bundled_checkpoint

GUIDE = Path(__file__).parents[1] / "docs" / "compose.md"


class Snippets:
    """The snippets of the guide by heading, which share their names as in one session of Python."""

    def __init__(self, substitutes: dict[str, str]):
        sections = GUIDE.read_text(encoding="utf-8").split("\n## ")[1:]
        found = {section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.S) for section in sections}
        self.substitutes, self.names = substitutes, {}
        self.code = {heading: code for heading, (code,) in found.items()}

    def run(self, heading: str) -> dict:
        code = self.code[heading]
        for written, substitute in self.substitutes.items():
            code = code.replace(written, substitute)
        exec(compile(code, f"{GUIDE.name}: {heading}", "exec"), self.names)
        return self.names


@pytest.fixture
def session(tmp_path, monkeypatch, selector_folder):
    """The guide's session, with its first snippet run in a folder that holds a photo and a mask."""
    try:
        bundled_checkpoint("nano")
    except ValueError:
        pytest.skip("the bundled model is not in this checkout")
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    mask = np.zeros((120, 160), np.uint8)
    mask[40:80, 50:110] = 255
    Image.fromarray(mask).save("mask.png")
    session = Snippets({"facebook/sam2.1-hiera-tiny": str(selector_folder), 'device="cuda"': 'device="cpu"'})
    names = session.run("Run all of it")
    names["pipe"].set_progress_bar_config(disable=True)
    return session


def outside_is_exact_and_inside_is_new(names: dict, result: Image.Image) -> bool:
    hole = np.asarray(names["mask"].convert("L")) > 127
    before, after = np.asarray(names["photo"]), np.asarray(result)
    return np.array_equal(before[~hole], after[~hole]) and (before[hole] != after[hole]).any(axis=1).mean() > 0.9


def test_run_all_of_it(session):
    assert outside_is_exact_and_inside_is_new(session.names, session.names["result"])


def test_take_what_lies_between(session):
    names = session.run("Take what lies between")
    assert names["latents"].shape[1] == 4 and names["seen_by_the_model"].shape[:2] == (1, 3)
    assert len(names["timesteps"]) == names["pipe"].config.default_num_inference_steps
    assert outside_is_exact_and_inside_is_new(names, names["found"]["images"][0])


def test_run_one_block_alone(session):
    session.run("Take what lies between")
    names = session.run("Run one block alone")
    assert names["part"].shape[:2] == (1, 3) and -1 <= names["part"].min() <= names["part"].max() <= 1
    assert names["fill"].shape == (120, 160, 3) and 0 <= names["fill"].min() <= names["fill"].max() <= 1
    assert set(names["decoder"].components) == {"vae"}


def test_swap_the_guider(session):
    seen = []
    names = session.names
    names["pipe"].unet.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    names = session.run("Swap the guider")
    assert (seen[:4], seen[4:]) == ([2, 2, 2, 2], [1, 1, 2, 2])
    assert isinstance(names["pipe"].guider, ClassifierFreeGuidance)
    assert not isinstance(names["pipe"].guider, AdaptiveProjectedGuidance)
    assert (np.asarray(names["projected"]) != np.asarray(names["late"])).any()


def test_put_your_own_block_in_front(session):
    names = session.run("Put your own block in front")
    mask = names["selector"].select(names["selector"].embed(names["photo"]), names["photo"].size, (120, 80))
    result = names["click_pipe"](image=names["photo"], point=(120, 80), output=["mask_image", "images"])
    np.testing.assert_array_equal(result["mask_image"], mask)
    changed = (np.asarray(result["images"][0]) != np.asarray(names["photo"])).any(axis=2)
    assert not changed[~mask].any() and changed[mask].any() == mask.any()
    assert names["removed"].size == names["photo"].size


def test_chain_two_runs(session, tmp_path):
    names = session.names
    trained = MoebiusInpaintPipeline.from_pretrained(bundled_checkpoint("nano"))
    torch.manual_seed(0)
    trained.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    trained.save_lora_weights(tmp_path / "my-style", get_peft_model_state_dict(trained.unet))
    names = session.run("Chain two runs")
    assert outside_is_exact_and_inside_is_new(names, names["first"])
    assert (np.asarray(names["first"]) != np.asarray(names["second"])).any()
    assert not names["pipe"].get_active_adapters()


def test_share_components_and_memory(session, monkeypatch):
    class Backend:
        """A CPU that says how much memory it has free, as devices with automatic offloading do."""

        def __init__(self, device):
            pass

        def mem_get_info(self):
            return 0, 0

    monkeypatch.setattr(components_manager, "TorchDeviceBackend", Backend)
    session.run("Swap the guider")
    names = session.run("Share components and memory")
    manager, remover, previewer = (names[name] for name in ("manager", "remover", "previewer"))
    assert len(manager.components) == 4  # VAE, U-Net, embedder and scheduler, once each
    for name in ("vae", "unet", "lcg_embedder", "scheduler"):
        assert getattr(remover, name) is getattr(previewer, name)
    assert remover.guider is not previewer.guider
    assert len(manager.model_hooks) == 3
    for result in (names["preview"], names["result"]):
        assert outside_is_exact_and_inside_is_new(names, result)


@pytest.mark.slow
def test_save_it_load_it_elsewhere(session, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = session.run("Save it, load it elsewhere")
    assert type(names["elsewhere"].unet).__module__.startswith("diffusers_modules.")
    assert names["elsewhere"].guider.config.guidance_scale == names["pipe"].guider.config.guidance_scale
    assert outside_is_exact_and_inside_is_new(names, names["same"])
