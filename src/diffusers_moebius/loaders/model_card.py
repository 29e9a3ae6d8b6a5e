"""The model card that is saved with a pipeline."""

import os

import torch
from huggingface_hub import ModelCard, ModelCardData
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
surrounds it. There is no text prompt.

## Use

```python
{example}
```

With the package `diffusers-moebius` installed, `MoebiusInpaintPipeline.from_pretrained` loads it without
`trust_remote_code`.

## What it is made of

| component | class | parameters |
|---|---|---|
{components}

Scheduler {scheduler}, default guidance scale {guidance_scale}.{origin}

## Intended use and limits

For removing objects and repairing damaged photos. The filled part is invented: it shows what is plausible, not what
was there, so do not use it where a picture is evidence. It learned from photos as they are found on the web and shares
their biases. Large holes over faces, hands, text or regular patterns often turn out wrong.

## Licence

The published Moebius weights are under the Apache License 2.0. Weights that were trained further carry the terms of
the data they were trained on as well.

## Citation

```bibtex
@misc{{moebius,
  title         = {{Moebius}},
  eprint        = {{{paper}}},
  archivePrefix = {{arXiv}},
  url           = {{https://arxiv.org/abs/{paper}}}
}}
```
"""


def make_model_card(pipeline, repo_id: str) -> ModelCard:
    """
    The card of a pipeline: what it is made of, how to use it, where it is from.

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
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="image-to-image",  # the hub has no tag for inpainting
        tags=["inpainting", "image-inpainting", "moebius", f"arxiv:{PAPER}"],
        base_model=base_model,
    )
    text = TEXT.format(
        title=repo_id.rpartition("/")[2],
        paper=PAPER,
        example=EXAMPLE.format(repo_id=repo_id),
        components="\n".join([*rows, f"| together | | {sum(counts.values()):,} |"]),
        scheduler=type(pipeline.scheduler).__name__,
        guidance_scale=pipeline.config.get("default_guidance_scale"),
        origin=f" Loaded from `{base_model}`." if base_model else "",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def hub_repository(name_or_path: str | None) -> str | None:
    """The name if it is that of a repository on the hub, which a path of this machine is not."""
    if name_or_path is None or str(name_or_path).count("/") != 1 or os.path.exists(name_or_path):
        return None
    try:
        validate_repo_id(str(name_or_path))
    except HFValidationError:
        return None
    return str(name_or_path)
