"""The models that the package brings along."""

from pathlib import Path


def bundled_checkpoints() -> dict[str, Path]:
    """The folders of all models that are part of the package, by name."""
    return {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/model_index.json"))}


def bundled_checkpoint(name: str = "nano") -> Path:
    """
    The folder of a model that is part of the package; [`MoebiusInpaintPipeline.from_pretrained`] also takes its name.

    Args:
        name (`str`, defaults to `"nano"`): Name of the model.

    Returns:
        `Path`: A pipeline folder in the layout of diffusers. It may lie in a read-only place.

    Raises:
        ValueError: If there is no such model.
    """
    folders = bundled_checkpoints()
    if name not in folders:
        raise ValueError(f"`name` must be one of the bundled models ({', '.join(folders)}), but is {name!r}.")
    return folders[name]
