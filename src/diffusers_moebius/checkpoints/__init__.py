"""The models that the package brings along."""

from pathlib import Path


def bundled_checkpoint(name: str = "nano") -> Path:
    """
    The folder of a model that is part of the package, for [`MoebiusInpaintPipeline.from_pretrained`].

    Args:
        name (`str`, defaults to `"nano"`): Name of the model.

    Returns:
        `Path`: A pipeline folder in the layout of diffusers. It may lie in a read-only place.

    Raises:
        ValueError: If there is no such model.
    """
    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"`name` must be one of the bundled models ({', '.join(names)}), but is {name!r}.")
    return folder / name
