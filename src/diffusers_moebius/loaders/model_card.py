"""The model card that is saved with a pipeline."""

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

PAPER = "2606.19195"

# The lines of the example are quoted one by one: diffusers searches saved code for lines that begin with an import.
EXAMPLE = "\n".join(
    (
        "import torch",
        "from diffusers import DiffusionPipeline",
        "from diffusers.utils import load_image",
        "",
        'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True, dtype=torch.float16)',
        'pipe.to("cuda")',
        'photo, mask = load_image("photo.png"), load_image("mask.png")  # white is filled',
        "result = pipe(image=photo, mask_image=mask).images[0]",
    )
)

TEXT = """# {title}

A [Moebius](https://arxiv.org/abs/{paper}) pipeline for image inpainting: it fills the white part of a mask from what
surrounds it. There is no text prompt: the only guidance is between two learned categories, *background* (what the hole
is filled as) and *foreground*.

## Use

```python
{example}
```

With the package `diffusers-moebius` installed, `MoebiusInpaintPipeline.from_pretrained` loads it without
`trust_remote_code`.{about}

## What it is made of

| component | class | parameters |
|---|---|---|
{components}

Scheduler {scheduler}, default guidance scale {guidance_scale}.{origin}

## The family

| model | where | parameters | native size | made by |
|---|---|---|---|---|
| Moebius: `pretrained`, `ft_places2`, `ft_celebahq`, `ft_ffhq` | `hustvl/Moebius` on the hub | 226 M and the autoencoder | 512 px | the authors of the paper |
| PixelHacker, the teacher of Moebius, and the autoencoder of both | `hustvl/PixelHacker` on the hub | 862 M | 512 px | the authors of PixelHacker |
| `nano` | in the package `diffusers-moebius` | 6.5 M and the autoencoder | 256 px | the package's project |

## Intended use

Removing objects, people or writing from photos, and repairing damaged ones; research on small inpainting models; a
starting point for fine-tuning on pictures of one's own. `nano` is for trying things out, for tests and for machines
without a network; for pictures that matter, use the published weights.

## Limits

- What is filled in is invented: plausible, not true. Do not use it where a picture is evidence, and do not use it to
  deceive, to remove marks of authorship that you have no right to remove, or to make pictures of people against their
  interest.
- Faces, hands, text and regular patterns often turn out wrong when most of them is hidden, and so do very large holes.
  The portrait weights know aligned faces in the middle of the picture.
- Models learn from photos as they are found and share their biases: what they invent looks like what they saw most.
- Pixels outside the mask stay as they are with `paste="exact"` (default) and `"seamless"` (default of `nano`); with
  other settings they change.

## Evaluation

{evaluation}

## Training data

{training_data}

## Licence

The published Moebius weights are under the Apache License 2.0; for those of PixelHacker see their repository. `nano`
and the code are under the Apache License 2.0. Weights that were trained further carry the terms of the data they were
trained on as well.

## Citation

```bibtex
@misc{{moebius,
  title         = {{Moebius}},
  eprint        = {{{paper}}},
  archivePrefix = {{arXiv}},
  url           = {{https://arxiv.org/abs/{paper}}}
}}

@misc{{pixelhacker,
  title         = {{PixelHacker}},
  eprint        = {{2504.20438}},
  archivePrefix = {{arXiv}},
  url           = {{https://arxiv.org/abs/2504.20438}}
}}
```
"""  # noqa: E501, rows of a table
NOT_EVALUATED = (
    "No figures were stored with these weights. `benchmarks/quality.py` of `diffusers-moebius` measures them on "
    "photos that you have."
)
PUBLISHED_DATA = (
    "Of the published Moebius weights: see the paper; `ft_places2` was tuned on Places2, `ft_celebahq` on CelebA-HQ, "
    "`ft_ffhq` on FFHQ, whose pictures have terms of their own. What other weights were trained on only those who "
    "trained them know."
)
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
    components = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in components.items()}
    rows = [f"| `{name}` | {type(part).__name__} | {counts[name]:,} |" for name, part in components.items()]
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
    text = TEXT.format(
        title=title,
        paper=PAPER,
        example=EXAMPLE.format(repo_id=repo_id),
        about="".join(f"\n\n{text}" for text in facts.get("about", [])),
        components="\n".join([*rows, f"| together | | {sum(counts.values()):,} |"]),
        scheduler=type(pipeline.scheduler).__name__,
        guidance_scale=pipeline.config.get("default_guidance_scale"),
        origin=f" Loaded from `{base_model}`." if base_model else "",
        evaluation=_evaluation_table(evaluation) if evaluation else NOT_EVALUATED,
        training_data="\n\n".join(facts.get("training_data", [PUBLISHED_DATA])),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


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


def _evaluation_table(evaluation: dict) -> str:
    metrics = evaluation["metrics"]
    lines = [
        f"{evaluation['description']}",
        "",
        "| method | " + " | ".join(metric["title"] for metric in metrics) + " |",
        "|---|" + "---:|" * len(metrics),
    ]
    for method, values in evaluation["scores"].items():
        cells = [f"{value:.{metric['digits']}f}" for metric, value in zip(metrics, values, strict=True)]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", evaluation["remark"]])


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
