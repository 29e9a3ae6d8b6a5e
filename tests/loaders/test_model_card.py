"""The model card that is saved with a pipeline."""

import pytest
from diffusers.utils.dynamic_modules_utils import check_imports
from huggingface_hub import ModelCard

from diffusers_moebius.loaders import model_card
from diffusers_moebius.loaders.model_card import make_model_card


def test_card(tiny_pipeline, tmp_path):
    make_model_card(tiny_pipeline, "somebody/inpaint").save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None
    assert "inpainting" in card.data.tags
    assert card.text.lstrip().startswith("# inpaint\n")
    assert 'from_pretrained("somebody/inpaint", trust_remote_code=True' in card.text
    parameters = sum(weight.numel() for weight in tiny_pipeline.unet.parameters())
    assert f"| `unet` | MoebiusUNet2DModel | {parameters:,} |" in card.text
    assert "DDIMScheduler" in card.text and "guidance scale 2.5" in card.text
    assert "eprint        = {2606.19195}" in card.text
    assert "{" not in card.text.replace("{2606.19195}", "").split("## Citation")[0]


@pytest.mark.parametrize(
    ("name", "base_model"),
    [("hustvl/Moebius", "hustvl/Moebius"), ("/home/me", None), ("one", None), ("a/b/c", None), ("no/such--id", None)],
)
def test_base_model_is_a_repository(tiny_pipeline, name, base_model):
    tiny_pipeline.register_to_config(_name_or_path=name)
    assert make_model_card(tiny_pipeline, "somebody/inpaint").data.base_model == base_model


def test_example_does_not_look_like_an_import_of_the_module(caplog):
    assert check_imports(model_card.__file__) == []
    assert "might require" not in caplog.text
