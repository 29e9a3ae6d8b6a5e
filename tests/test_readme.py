"""The README's code."""

import re
from pathlib import Path

import pytest
import torch

from diffusers_moebius import bundled_checkpoint

README = Path(__file__).parents[1] / "README.md"


def snippets(heading):
    section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def test_python_snippets_compile():
    found = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(found) >= 3
    for code in found:
        compile(code, "README.md", "exec")


def test_comfyui_node():
    try:
        bundled_checkpoint("nano")
    except ValueError:
        pytest.skip("the bundled model is not in this checkout")
    (code,) = snippets("In ComfyUI")
    names = {}
    exec(code, names)
    node_class = names["NODE_CLASS_MAPPINGS"]["MoebiusInpaint"]
    inputs = node_class.INPUT_TYPES()["required"]
    assert {name: declared[0] for name, declared in inputs.items()} == {
        "image": "IMAGE",
        "mask": "MASK",
        "seed": "INT",
    }
    assert node_class.RETURN_TYPES == ("IMAGE",)
    image = torch.rand(2, 72, 96, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 72, 96)
    mask[0, 20:40, 30:60] = 1
    mask[1, 10:30, 10:40] = 0.8  # soft, as ComfyUI's masks may be
    run = getattr(node_class(), node_class.FUNCTION)
    (result,) = run(image=image, mask=mask, seed=3)
    assert (result.shape, result.dtype, result.device.type) == (image.shape, torch.float32, "cpu")
    hole = mask > 0.5
    assert torch.equal(result[~hole], image[~hole])
    assert not torch.isclose(result[hole], image[hole]).all(dim=-1).any()
    assert torch.equal(result, run(image=image, mask=mask, seed=3)[0])
    assert not torch.equal(result, run(image=image, mask=mask, seed=4)[0])
    assert run(image=image, mask=mask[:1], seed=3)[0].shape == image.shape  # one mask for all
