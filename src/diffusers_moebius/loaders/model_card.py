"""The model card that is saved with a pipeline."""

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..models.fusion import adapter_layers

PAPER = "2606.19195"

TEMPLATE = Path(__file__).with_name("model_card_template.md")
LORA_TEMPLATE = Path(__file__).with_name("lora_card_template.md")
# Facts about the weights of a pipeline folder, which no component holds: where they come from and how good they are.
FACTS_FILE = "card.json"


def make_model_card(pipeline, repo_id: str) -> ModelCard:
    """
    The card of a pipeline: what it is made of, how to use it, where it is from, how good it is.

    A pipeline that was loaded from a folder with a `card.json` has the training data that it names, and, as long as
    the weights are those that were measured, its scores, also as the hub's `model-index`.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        repo_id (`str`): Where it will be found: a repository or a folder.

    Returns:
        `ModelCard`: Metadata for the hub, and text.
    """
    components = [
        {"name": name, "class": type(part).__name__, "parameters": sum(weight.numel() for weight in part.parameters())}
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    ]
    base_model = hub_repository(pipeline.config.get("_name_or_path"))
    title = repo_id.rpartition("/")[2]
    facts = weight_facts(pipeline) or {}
    evaluation = facts.get("evaluation")
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="image-to-image",  # the hub has no tag for inpainting
        tags=["inpainting", "image-inpainting", "moebius", f"arxiv:{PAPER}"],
        base_model=base_model,
        model_name=title if evaluation else None,
        eval_results=_eval_results(evaluation) if evaluation else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        repo_id=repo_id,
        about=facts.get("about", []),
        components=components,
        scheduler=type(pipeline.scheduler).__name__,
        guidance_scale=pipeline.config.get("default_guidance_scale"),
        evaluation=evaluation,
        training_data=facts.get("training_data"),
    )


def make_lora_card(pipeline, repo_id: str, base: str, is_few_step: bool = False) -> ModelCard:
    """
    The card of the adapter `default` of a pipeline's U-Net.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline with the adapter.
        repo_id (`str`): Where the adapter will be found: a repository or a folder.
        base (`str`): The repository or folder of the pipeline without it.
        is_few_step (`bool`, defaults to `False`): Whether it is made for the pipeline's default steps and guidance,
            which a file of weights cannot say: the card then sets them, which the command line could not.

    Returns:
        `ModelCard`: Metadata for the hub, and text.
    """
    config, base_model = pipeline.unet.peft_config["default"], hub_repository(base)
    names = ("default_num_inference_steps", "default_guidance_scale", "default_strength", "default_guidance_start")
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["lora", "inpainting", "image-inpainting", "moebius", f"arxiv:{PAPER}"],
        base_model=base_model,
    )
    return ModelCard.from_template(
        data,
        template_path=str(LORA_TEMPLATE),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        location=base_model or Path(base).name,
        defaults=", ".join(f"{name}={pipeline.config[name]}" for name in names) if is_few_step else None,
        rank=config.r,
        layers=len(adapter_layers(pipeline.unet)),
        targets=", ".join(f"`{target}`" for target in sorted(config.target_modules)),
    )


def weight_facts(pipeline) -> dict | None:
    """
    The facts of the folder or repository that a pipeline was loaded from, as far as they hold for its present weights.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.

    Returns:
        `dict`, *optional*: `about`, `training_data` (Markdown paragraphs), and for unchanged weights `evaluation` with
        the `fingerprint` of what was measured; `None` if there were no facts.
    """
    # Loaded by our class it knows the file; `DiffusionPipeline` leaves the name, which may be that of a folder.
    path = getattr(pipeline, "_facts_path", None) or Path(pipeline.config.get("_name_or_path") or "") / FACTS_FILE
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or not {"fingerprint", "training_data"} <= set(facts):
        return None  # somebody's file of the same name
    if facts["fingerprint"] == weights_fingerprint(pipeline):
        return facts
    further = "These weights were changed or trained further; the data above is that of the weights they come from."
    return {"fingerprint": weights_fingerprint(pipeline), "training_data": [*facts["training_data"], further]}


def weights_fingerprint(pipeline) -> str:
    """SHA-256 of all weights by name, as float16, so that loading at a higher precision does not change it."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            for key, weight in sorted(part.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                weight = weight.detach().cpu()
                weight = weight.half() if weight.is_floating_point() else weight
                digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _eval_results(evaluation: dict) -> list[EvalResult]:
    """The scores of the model itself, which its row's name in backticks marks, for the hub's `model-index`."""
    values = next(values for method, values in evaluation["scores"].items() if method.startswith("`"))
    return [
        EvalResult(
            task_type="image-to-image",
            task_name="Image inpainting",
            dataset_type=evaluation["dataset"]["type"],
            dataset_name=evaluation["dataset"]["name"],
            metric_type=metric["type"],
            metric_name=metric["title"].rstrip(" ↑↓"),
            metric_value=value,
        )
        for metric, value in zip(evaluation["metrics"], values, strict=True)
    ]


def hub_repository(name_or_path: str | None) -> str | None:
    """The name if it is that of a repository on the hub, which a path of this machine is not."""
    if name_or_path is None or str(name_or_path).count("/") != 1 or os.path.exists(name_or_path):
        return None
    try:
        validate_repo_id(str(name_or_path))
    except HFValidationError:
        return None
    return str(name_or_path)
