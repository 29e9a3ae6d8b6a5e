"""The model card that is saved with a pipeline."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from diffusers_moebius import MoebiusInpaintPipeline, bundled_checkpoint
from diffusers_moebius.loaders.model_card import make_model_card, weight_facts

REPOSITORY = Path(__file__).parents[2]


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
    assert "{{" not in card.text and "{%" not in card.text
    assert "{" not in card.text.replace("{2606.19195}", "").split("## Citation")[0]


@pytest.mark.parametrize(
    ("name", "base_model"),
    [("hustvl/Moebius", "hustvl/Moebius"), ("/home/me", None), ("one", None), ("a/b/c", None), ("no/such--id", None)],
)
def test_base_model_is_a_repository(tiny_pipeline, name, base_model):
    tiny_pipeline.register_to_config(_name_or_path=name)
    assert make_model_card(tiny_pipeline, "somebody/inpaint").data.base_model == base_model


def load_bundled():
    try:
        return MoebiusInpaintPipeline.from_pretrained(bundled_checkpoint("nano"))
    except ValueError:
        pytest.skip("the bundled model is not in this checkout")


def test_the_card_of_this_repository_is_that_of_the_bundled_model():
    rendered = str(make_model_card(load_bundled(), "nano")).rstrip() + "\n"
    assert (REPOSITORY / "model_card.md").read_text(encoding="utf-8") == rendered, (
        'write `make_model_card(pipeline, "nano")` of the bundled model to model_card.md; for new weights first put '
        "their scores and `weights_fingerprint(pipeline)` into card.json"
    )


def test_bundled_scores_are_in_the_metadata_and_the_readme():
    pipeline = load_bundled()
    card = make_model_card(pipeline, "somebody/nano")
    evaluation = weight_facts(pipeline)["evaluation"]
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == dict(
        zip([m["title"].rstrip(" ↑↓") for m in evaluation["metrics"]], evaluation["scores"]["`nano`"], strict=True)
    )
    table = [line for line in card.text.split("## Evaluation")[1].split("## ")[0].splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(evaluation["scores"])
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert set(table[2:]) <= set(readme)
    for heading in ("Intended use", "Limits", "Training data", "Licence", "Citation"):
        assert f"\n## {heading}\n" in card.text


def test_facts_are_saved_and_scores_belong_to_unchanged_weights(tmp_path):
    load_bundled().save_pretrained(tmp_path / "copy")
    copy = MoebiusInpaintPipeline.from_pretrained(tmp_path / "copy")
    assert weight_facts(copy) == weight_facts(load_bundled())
    assert "| PSNR in the hole" in (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    with torch.no_grad():
        next(copy.unet.parameters()).add_(1)
    copy.save_pretrained(tmp_path / "further")
    card = ModelCard.load(tmp_path / "further" / "README.md")
    assert card.data.eval_results is None
    assert "PSNR in the hole" not in card.text and "CC-BY-4.0" in card.text and "trained further" in card.text
    again = MoebiusInpaintPipeline.from_pretrained(tmp_path / "further")
    assert str(make_model_card(again, "further")).count("changed or trained further") == 1


@pytest.mark.parametrize("subfolder", [None, "photos"])
def test_facts_come_along_from_a_repository(hub, tmp_path, subfolder):
    bundled = load_bundled()
    bundled.push_to_hub("somebody/nano", subfolder=subfolder)
    for kwargs in ({}, {"local_files_only": True}):  # also from the cache
        loaded = MoebiusInpaintPipeline.from_pretrained("somebody/nano", subfolder, **kwargs)
        assert weight_facts(loaded) == weight_facts(bundled)
    loaded.push_to_hub("else/copy")
    card = hub.repositories["else/copy"].files("main")["README.md"].decode()
    assert "| PSNR in the hole" in card and "model-index" in card


def test_a_file_of_the_same_name_is_left_alone(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "card.json").write_text('{"name": "ace of spades"}')
    pipeline = MoebiusInpaintPipeline.from_pretrained(tmp_path / "pipeline")
    assert weight_facts(pipeline) is None
    pipeline.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "card.json").exists()
