"""What a saved pipeline tells diffusers: where its components are, and code for machines without this package."""

import json
import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec, resolve_name
from pathlib import Path

import diffusers
from diffusers.models.modeling_utils import ModelMixin

from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DModel
from ..models.unet_2d_pixelhacker import PixelHackerUNet2DModel

PACKAGE = __name__.partition(".")[0]
# Other modules than these travel with a saved pipeline.
LOADERS = f"{PACKAGE}.loaders"
# Classes of ours that a saved pipeline may name, wherever they lay when it was saved.
COMPONENT_CLASSES = {
    cls.__name__: cls for cls in (MoebiusUNet2DModel, PixelHackerUNet2DModel, LatentCategoriesEmbedder)
}
OWN_IMPORT = re.compile(r"^( *)from (\.+[\w.]+) import ", re.MULTILINE)
# The files of a pipeline find those of its components in their folders. Python is not left to import their package,
# which it cannot where a repository has a dot in its name.
ENTRY = '''"""What diffusers loads of this folder: it fetches each file that a line here names."""

import sys
from importlib import invalidate_caches
from os.path import dirname
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
{fetched}
package = sys.modules.setdefault(__package__, ModuleType(__package__))
here = dirname(__file__)
package.__path__ = list(dict.fromkeys([{folders}*getattr(package, "__path__", []), here]))
invalidate_caches()

from .{module} import {name}
'''


def travelling_files(module_name: str) -> dict[str, str]:
    """
    The files that a module of this package needs where the package is not installed; loaders are not among them.

    There they lie side by side, so `from ..pictures.mask import load_masks` becomes `from . mask import load_masks`,
    and nothing else is changed. The space hides the line from diffusers, which follows imports only in part:
    [`write_code`] names all files in one place instead.

    Args:
        module_name (`str`): Full name of the module.

    Returns:
        `dict[str, str]`: The contents of the files by their names.
    """
    files, waiting = {}, [module_name]
    while waiting:
        name = waiting.pop()
        parent, _, stem = name.rpartition(".")
        if f"{stem}.py" in files or name.startswith(LOADERS):
            continue
        source = Path(find_spec(name).origin).read_text(encoding="utf-8")
        waiting += [resolve_name(line[2], parent) for line in OWN_IMPORT.finditer(source)]
        files[f"{stem}.py"] = OWN_IMPORT.sub(lambda line: f"{line[1]}from . {line[2].split('.')[-1]} import ", source)
    return files


def write_code(
    folder: Path, entry: str, module: str, name: str, elsewhere: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, str]:
    """
    Writes the code of a class, and the module that diffusers is to load, which names all files of it.

    Args:
        folder (`Path`): The folder, created if need be.
        entry (`str`): Name of that module.
        module (`str`): Full name of the module of this package that defines the class.
        name (`str`): Name of the class.
        elsewhere (`Mapping`, *optional*): Files that are written to folders within this one, by folder and name.

    Returns:
        `dict[str, str]`: The files without that module, as [`travelling_files`] returns them.
    """
    elsewhere = elsewhere or {}
    there = {file for files in elsewhere.values() for file in files}
    files = {file: text for file, text in travelling_files(module).items() if file not in there}
    fetched = sorted(
        [*files, *(f"{inner}.{file}" for inner, inner_files in elsewhere.items() for file in inner_files)]
    )
    text = ENTRY.format(
        fetched="".join(f"    from .{file.removesuffix('.py')} import *\n" for file in fetched),
        folders="".join(f'f"{{here}}/{inner}", ' for inner in elsewhere),
        module=module.rpartition(".")[2],
        name=name,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in {**files, f"{entry}.py": text}.items():
        (folder / file).write_text(content, encoding="utf-8")
    return files


def write_indexes_and_code(folder: Path, pipeline, repo_id: str, variant: str | None) -> None:
    """
    Makes `model_index.json` one that diffusers understands without this package, and writes the code that it names.

    Args:
        folder (`Path`): The folder to which `DiffusionPipeline.save_pretrained` has saved a pipeline.
        pipeline ([`MoebiusInpaintPipeline`]): The pipeline.
        repo_id (`str`): Where the components are found once the folder is on the hub.
        variant (`str`, *optional*): Variant of the weights.
    """
    path = folder / pipeline.config_name
    index = json.loads(path.read_text(encoding="utf-8"))
    code = {}
    for name, value in index.items():
        if isinstance(value, list) and str(value[0]).startswith(f"{PACKAGE}."):
            entry = f"load_{name}"
            code[name] = write_code(folder / name, entry, *value)
            value[0] = entry
    cls = type(pipeline)
    if cls.__module__.startswith(f"{PACKAGE}."):  # a class that somebody derived is not ours to copy
        index["_class_name"] = ["load_pipeline", cls.__name__]
        write_code(folder, "load_pipeline", cls.__module__, cls.__name__, code)
        write_modular_index(folder, pipeline, repo_id, variant, code)
    if "unet" in code:
        # For `AutoModel`, which reads no other config where this one is; hidden from the pipeline's own arguments.
        index["auto_map"] = {"AutoModel": f"load_unet.{index['unet'][1]}"}
        index["_use_default_values"] = {"auto_map": None}
    if os.path.exists(index.get("_name_or_path") or ""):
        del index["_name_or_path"]  # a path of this machine
    _write_json(path, index)


def write_modular_index(
    folder: Path, pipeline, repo_id: str, variant: str | None, code: Mapping[str, Mapping[str, str]]
) -> None:
    """
    Writes what Modular Diffusers reads of a folder: the blocks, the guider, and where to find each component.

    Args:
        folder (`Path`): The folder of a saved pipeline.
        pipeline ([`MoebiusInpaintPipeline`]): The pipeline that was saved.
        repo_id (`str`): Where the components are found once the folder is on the hub.
        variant (`str`, *optional*): Variant of the weights.
        code (`Mapping`): The files of code that lie in the folders of components.
    """
    blocks = pipeline.modular_blocks
    name, version = blocks.__name__, {"_diffusers_version": diffusers.__version__}
    write_code(folder, "load_blocks", blocks.__module__, name, code)
    auto_map = {"auto_map": {"ModularPipelineBlocks": f"load_blocks.{name}"}}
    _write_json(folder / blocks.config_name, {"_class_name": name, **auto_map, **version})

    settings = {key: value for key, value in pipeline.config.items() if key.startswith("default_")}
    guider = {"guidance_scale": settings["default_guidance_scale"], "start": settings["default_guidance_start"]}
    guider_class = "ClassifierFreeGuidance"
    _write_json(folder / "guider" / "guider_config.json", {"_class_name": guider_class, **guider, **version})

    index = {"_class_name": "ModularPipeline", "_blocks_class_name": name, **version, **settings}
    components = {key: component for key, component in pipeline.components.items() if component is not None}
    classes = {key: type(component) for key, component in components.items()}
    named = {key: (cls.__module__.partition(".")[0], cls.__name__) for key, cls in classes.items()}
    for key, (library, class_name) in {**named, "guider": ("diffusers", guider_class)}.items():
        library = sys.modules[blocks.__module__].MODULE_FOR_INDEX if class_name in COMPONENT_CLASSES else library
        place = {"pretrained_model_name_or_path": repo_id, "subfolder": key, "revision": None}
        place["variant"] = variant if issubclass(classes.get(key, object), ModelMixin) else None
        index[key] = [library, class_name, {"type_hint": [library, class_name], **place}]
    _write_json(folder / "modular_model_index.json", index)


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
