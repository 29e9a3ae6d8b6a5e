"""Pipelines in folders and repositories: both published layouts are read, and one that diffusers loads is written."""

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec, resolve_name
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging
from huggingface_hub import (
    HfApi,
    create_repo,
    hf_hub_download,
    model_info,
    snapshot_download,
    try_to_load_from_cache,
    upload_folder,
)
from huggingface_hub.utils import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    httpx,
    validate_repo_id,
)

from ..checkpoints import bundled_checkpoints
from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DModel
from ..models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from .model_card import FACTS_FILE, make_model_card, weight_facts
from .release_checkpoint import (
    DEFAULT_CHECKPOINT,
    RELEASE_VAE_REPOSITORY,
    component_dtype,
    default_guidance_scale,
    load_release_components,
    make_release_scheduler,
    weight_names,
)

logger = logging.get_logger(__name__)

PACKAGE = __name__.partition(".")[0]
# Classes of ours that a saved pipeline may name, wherever they lay when it was saved.
COMPONENT_CLASSES = {
    cls.__name__: cls for cls in (MoebiusUNet2DModel, PixelHackerUNet2DModel, LatentCategoriesEmbedder)
}
PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

# Other modules than these travel with a saved pipeline.
LOADERS = f"{PACKAGE}.loaders"
OWN_IMPORT = re.compile(r"^( *)from (\.+[\w.]+) import ", re.MULTILINE)
ENTRY = '''"""What diffusers loads of this folder: it fetches each file that a line here names."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
{fetched}{search}
from .{module} import {name}
'''
# The pipeline's file finds those of its components in their folders.
SEARCH = """
from os.path import dirname, join

from . import __path__ as path

path[:0] = [join(dirname(__file__), folder) for folder in {folders}]
"""


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
    folder: Path,
    entry: str,
    cls: type,
    files: Mapping[str, str],
    elsewhere: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """
    Writes code to a folder, and the module that diffusers is to load, which names all of it.

    Args:
        folder (`Path`): The folder, created if need be.
        entry (`str`): Name of that module.
        cls (`type`): The class that it gives.
        files (`Mapping[str, str]`): Contents by file name, as [`travelling_files`] returns them.
        elsewhere (`Mapping`, *optional*): Files that the class needs as well and that are in folders within this one:
            the files of each folder.
    """
    elsewhere = elsewhere or {}
    modules = [*files, *(f"{inner}.{file}" for inner, inner_files in elsewhere.items() for file in inner_files)]
    text = ENTRY.format(
        fetched="".join(f"    from .{module.removesuffix('.py')} import *\n" for module in sorted(modules)),
        search=SEARCH.format(folders=list(elsewhere)) if elsewhere else "",
        module=cls.__module__.rpartition(".")[2],
        name=cls.__name__,
    )
    for name, content in {**files, f"{entry}.py": text}.items():
        _write(folder / name, content)


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
    from ..pipelines.modular_blocks_moebius import MODULE_FOR_INDEX, MoebiusAutoBlocks

    known = {file for files in code.values() for file in files}
    files = {name: text for name, text in travelling_files(MoebiusAutoBlocks.__module__).items() if name not in known}
    write_code(folder, "load_blocks", MoebiusAutoBlocks, files, code)
    version = {"_diffusers_version": diffusers.__version__}
    name = MoebiusAutoBlocks.__name__
    blocks = {"_class_name": name, "auto_map": {"ModularPipelineBlocks": f"load_blocks.{name}"}, **version}
    _write(folder / MoebiusAutoBlocks.config_name, json.dumps(blocks, indent=2) + "\n")

    settings = {key: value for key, value in pipeline.config.items() if key.startswith("default_")}
    guider = {"_class_name": "ClassifierFreeGuidance", "start": settings["default_guidance_start"], **version}
    guider["guidance_scale"] = settings["default_guidance_scale"]
    _write(folder / "guider" / "guider_config.json", json.dumps(guider, indent=2) + "\n")

    index = {"_class_name": "ModularPipeline", "_blocks_class_name": name, **version, **settings}
    classes = {key: type(component) for key, component in pipeline.components.items()}
    named = {key: (cls.__module__.partition(".")[0], cls.__name__) for key, cls in classes.items()}
    for key, (library, class_name) in {**named, "guider": ("diffusers", "ClassifierFreeGuidance")}.items():
        library = MODULE_FOR_INDEX if class_name in COMPONENT_CLASSES else library
        place = {"pretrained_model_name_or_path": repo_id, "subfolder": key, "revision": None}
        place["variant"] = variant if issubclass(classes.get(key, object), ModelMixin) else None
        index[key] = [library, class_name, {"type_hint": [library, class_name], **place}]
    _write(folder / "modular_model_index.json", json.dumps(index, indent=2) + "\n")


class ModelSource:
    """
    A folder or a repository on the hub, of which some files are wanted.

    Whether the hub answers is found out once. If it does not, everything comes from the cache without further waiting,
    as in `DiffusionPipeline.download`.

    Args:
        argument (`str`): Name of the argument that gave the source, for error messages.
        location (`str` or `os.PathLike`): The folder, the repository's id, or the name of a bundled model.
        candidates (`list[str]`): Files to look for in the cache if the hub cannot be asked for its list.
        hub_kwargs: The `HUB_ARGUMENTS` of diffusers' `from_pretrained`.
    """

    def __init__(self, argument: str, location: str | os.PathLike, candidates: list[str], **hub_kwargs):
        self.argument = argument
        self.location = str(location)
        bundled = bundled_checkpoints().get(self.location)
        if bundled is not None and os.path.isdir(self.location):
            logger.warning(f"`{argument}` {self.location} is taken as the folder of that name, not the bundled model.")
        elif bundled is not None:
            self.location = str(bundled)
        self.hub_kwargs = hub_kwargs
        # What also holds for another repository; whether the hub gives that one is another question.
        self.kwargs_elsewhere = {name: value for name, value in hub_kwargs.items() if name != "revision"}
        self.offline_reason: Exception | None = None
        if os.path.isdir(self.location):
            root = Path(self.location)
            paths = [*root.glob("*"), *root.glob("*/*")]
            self.files = {path.relative_to(root).as_posix() for path in paths if path.is_file()}
            return
        try:
            validate_repo_id(self.location)
        except HFValidationError as error:
            raise ValueError(
                f"`{argument}` must be a folder or the id of a repository, but is {self.location}."
            ) from error
        if os.path.exists(self.location):
            raise ValueError(
                f"`{argument}` must be a folder or the id of a repository, but {self.location} is a file."
            )
        if not hub_kwargs.get("local_files_only"):
            names = ("revision", "token")
            try:
                info = model_info(self.location, **{name: hub_kwargs.get(name) for name in names})
                self.files = {sibling.rfilename for sibling in info.siblings}
                return
            except (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError) as error:
                logger.warning(f"The hub does not give {self.location}; trying the cache. ({_summary(error)})")
                self.offline_reason = error
        self.hub_kwargs = {**hub_kwargs, "local_files_only": True}
        cached = {name: hub_kwargs.get(name) for name in ("cache_dir", "revision")}
        self.files = {
            name for name in candidates if isinstance(try_to_load_from_cache(self.location, name, **cached), str)
        }

    @property
    def is_cache(self) -> bool:
        """Whether `files` are only what the cache holds."""
        return bool(self.hub_kwargs.get("local_files_only")) and not os.path.isdir(self.location)

    def path(self, name: str) -> str:
        """The local path of a file, downloaded if need be."""
        if os.path.isdir(self.location):
            return os.path.join(self.location, name)
        with self.download():
            return hf_hub_download(self.location, name, **self.hub_kwargs)

    def snapshot(self, folder: str) -> str:
        """The local path of a folder with all that it holds, downloaded if need be."""
        if os.path.isdir(self.location):
            return os.path.join(self.location, folder)
        with self.download():
            root = snapshot_download(self.location, allow_patterns=f"{folder}/*", **self.hub_kwargs)
        return os.path.join(root, *folder.split("/"))

    @contextmanager
    def download(self) -> Iterator[None]:
        """Makes an `OSError`, as for all else that is not there, of a connection that breaks."""
        try:
            yield
        except httpx.TransportError as error:
            raise OSError(f"The download of `{self.argument}` {self.location} failed: {_summary(error)}") from error

    def not_cached_error(self) -> OSError:
        """What to raise if the cache alone does not do."""
        if self.offline_reason is None:
            return OSError(f"`{self.argument}` {self.location} is not in the cache, and `local_files_only` is set.")
        hint = ""
        if isinstance(self.offline_reason, RepositoryNotFoundError):
            hint = " If the repository is private or gated, pass a `token` that may read it, or run `hf auth login`."
        return OSError(
            f"`{self.argument}` {self.location} is no folder, not in the cache, and the hub does not give it:"
            f" {_summary(self.offline_reason)}{hint}"
        )


def _summary(error: Exception) -> str:
    """What went wrong and where, of the many lines of the client's errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def load_vae(
    vae: str | os.PathLike | ModelMixin,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **hub_kwargs,
) -> ModelMixin:
    """
    Loads an autoencoder of whichever class its config names.

    Args:
        vae (`str`, `os.PathLike` or `ModelMixin`): A folder or repository with an autoencoder, by itself or in the
            folder `vae`; a model is returned as it is.
        dtype (`torch.dtype` or `Mapping`, *optional*): Type of the weights, or one for each component.
        variant (`str`, *optional*): Variant of the weights; the plain ones are taken if there is none of this name.
        use_safetensors (`bool`, *optional*): Only safetensors, or only pickles.
        hub_kwargs: As in diffusers' `from_pretrained`.

    Returns:
        `ModelMixin`: The autoencoder, in eval mode.
    """
    if not isinstance(vae, str | os.PathLike):
        return vae
    folders = ("vae/", "")
    plain, variants = weight_names(None, use_safetensors), weight_names(variant, use_safetensors)
    wanted = ["config.json", *plain, *variants]
    source = ModelSource("vae", vae, [folder + name for folder in folders for name in wanted], **hub_kwargs)
    folder = next((folder for folder in folders if f"{folder}config.json" in source.files), None)
    if folder is None and source.is_cache:
        raise source.not_cached_error()
    if folder is None:
        raise ValueError(f"`vae` must hold config.json or vae/config.json, but {source.location} does not.")
    subfolder = {"subfolder": folder.strip("/")} if folder else {}
    config = json.loads(Path(source.path(f"{folder}config.json")).read_text(encoding="utf-8"))
    class_name = str(config.get("_class_name"))
    vae_class = getattr(diffusers, class_name, None)
    if not hasattr(vae_class, "decode"):
        raise ValueError(
            f"`vae` must hold an autoencoder of diffusers, but the config in {source.location} names {class_name!r}."
        )
    if variant is not None and not any(folder + name in source.files for name in variants):
        variant, variants = None, plain
    # Naming the kind of file that is there saves a request for the other, and a warning about its absence.
    kind = next((name.endswith(".safetensors") for name in variants if folder + name in source.files), use_safetensors)
    with source.download():
        return vae_class.from_pretrained(
            source.location,
            torch_dtype=component_dtype(dtype, "vae"),
            variant=variant,
            use_safetensors=kind,
            **subfolder,
            **source.hub_kwargs,
        )


class MoebiusLoaderMixin:
    """
    `from_pretrained`, `save_pretrained` and `push_to_hub` of a Moebius pipeline; to stand before `DiffusionPipeline`.

    A saved folder also carries the code of the pipeline and of its components, so that
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` runs it where this package is not installed.
    The classes of this package never run that code, and it holds neither these loaders nor those of adapters.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        checkpoint: str | None = None,
        vae: str | os.PathLike | ModelMixin | None = None,
        config: Mapping[str, Any] | str | os.PathLike | None = None,
        **kwargs,
    ):
        """
        Loads a pipeline from a folder or the hub, in the layout of the release or in that of diffusers.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, the id of a repository on the hub, or
                `"nano"`, the model that is part of the package (unless there is a folder of that name).
            checkpoint (`str`, *optional*): In the release's layout (`hustvl/Moebius`) the folder of the checkpoint:
                `pretrained`, `ft_places2` (the default), `ft_celebahq` or `ft_ffhq`; the default guidance scale of the
                latter two is 2.0 instead of 2.5. In the layout of diffusers only for a repository that holds several
                pipelines in folders.
            vae (`str`, `os.PathLike` or `ModelMixin`, *optional*): Another autoencoder, its folder or its repository.
                If it is not given, the layout of diffusers has its own, and for that of the release it comes from
                `hustvl/PixelHacker`, folder `vae`.
            config (`Mapping`, `str` or `os.PathLike`, *optional*): For the release's layout, a config in the release's
                names, or a JSON or YAML file of it. Needed only if `norm_num_groups` is not that of the published
                models.
            kwargs: As in [`~diffusers.DiffusionPipeline.from_pretrained`]: `dtype` (or `torch_dtype`), `variant`,
                `use_safetensors`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies`,
                and components that are to replace the stored ones. The rest only in the layout of diffusers.

        Returns:
            The pipeline, its models in eval mode.

        Raises:
            ValueError: If an argument does not fit to what is found, or a checkpoint is not one of Moebius.
            OSError: If files are neither there nor in the cache, and the hub does not give them.
        """
        folder = checkpoint or DEFAULT_CHECKPOINT
        weights = weight_names(kwargs.get("variant"), kwargs.get("use_safetensors"))
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        index = cls.config_name
        candidates = [index, FACTS_FILE, *(f"{folder}/{name}" for name in (index, *weights))]
        source = ModelSource("pretrained_model_name_or_path", pretrained_model_name_or_path, candidates, **hub_kwargs)

        in_root = index in source.files
        in_folder = f"{folder}/{index}" in source.files
        if in_root and checkpoint is not None and not in_folder:
            raise ValueError(
                f"`checkpoint` must name a folder with a pipeline in {source.location}, or not be given to load the"
                f" pipeline that this is itself, but is {checkpoint!r}."
            )
        if not in_root and not in_folder:
            return cls._from_release(source, folder, vae, config, **kwargs)

        if config is not None:
            raise ValueError(f"`config` is for checkpoints of the release, but {source.location} holds a pipeline.")
        kwargs |= source.hub_kwargs
        location = source.location
        if in_folder and (checkpoint is not None or not in_root):
            location = source.snapshot(folder)
        if vae is not None:
            vae_kwargs = {name: kwargs.get(name) for name in ("variant", "use_safetensors")}
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            kwargs["vae"] = load_vae(vae, dtype, **vae_kwargs, **source.kwargs_elsewhere)
        with source.download():
            pipeline = super().from_pretrained(location, **kwargs)
        if location != source.location:
            pipeline._facts_path = Path(location, FACTS_FILE)
        elif FACTS_FILE in source.files:
            pipeline._facts_path = Path(source.path(FACTS_FILE))
        return pipeline

    @classmethod
    def _from_release(cls, source: ModelSource, folder: str, vae, config, **kwargs):
        dtype, torch_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
        if dtype is not None and torch_dtype is not None:
            raise ValueError("`dtype` and `torch_dtype` mean the same: give one of them.")
        dtype = torch_dtype if dtype is None else dtype
        dtype = torch.float32 if dtype is None else dtype
        if not isinstance(dtype, torch.dtype | Mapping):
            raise ValueError(f"`dtype` must be a `torch.dtype` or a dict of them, but is {dtype!r}.")
        variant, use_safetensors = kwargs.pop("variant", None), kwargs.pop("use_safetensors", None)
        disable_mmap = kwargs.pop("disable_mmap", False)
        for name in (*HUB_ARGUMENTS, "trust_remote_code", "low_cpu_mem_usage"):  # no code there, and memory always low
            kwargs.pop(name, None)
        components = set(inspect.signature(cls.__init__).parameters) - {"self"}
        unknown = sorted(set(kwargs) - components)
        if unknown:
            raise ValueError(
                f"`{unknown[0]}` is not an argument for checkpoints of the release. If diffusers knows it, convert the"
                " checkpoint with `moebius convert` first."
            )

        if not {"unet", "lcg_embedder"} <= set(kwargs):
            path = source.path(cls._find_release_weights(source, folder, variant, use_safetensors))
            kwargs = {**load_release_components(path, config, dtype, disable_mmap), **kwargs}
        kwargs.setdefault("scheduler", make_release_scheduler())
        kwargs.setdefault("default_guidance_scale", default_guidance_scale(folder))
        vae = RELEASE_VAE_REPOSITORY if vae is None else vae
        vae = load_vae(vae, dtype, variant, use_safetensors, **source.kwargs_elsewhere)
        pipeline = cls(vae=vae, **kwargs)
        pipeline.register_to_config(_name_or_path=source.location)
        return pipeline

    @staticmethod
    def _find_release_weights(
        source: ModelSource, folder: str, variant: str | None, use_safetensors: bool | None
    ) -> str:
        names = [f"{folder}/{name}" for name in weight_names(variant, use_safetensors)]
        # A folder with a config is a component in the layout of diffusers, such as the autoencoder.
        is_component = f"{folder}/config.json" in source.files
        for name in names:
            if name in source.files and not is_component:
                return name
        if source.is_cache:
            raise source.not_cached_error()
        folders = {
            parent
            for parent, _, name in (file.rpartition("/") for file in source.files)
            if name in weight_names() and f"{parent}/config.json" not in source.files
        }
        if folder in folders:
            raise ValueError(
                f"`variant` and `use_safetensors` ask for {' or '.join(names)}, which {source.location} does not have."
            )
        if folders - {""}:
            raise ValueError(
                f"`checkpoint` must be one of {', '.join(sorted(folders - {''}))} for {source.location}, but is"
                f" {folder!r}."
            )
        raise ValueError(
            f"`{source.argument}` must hold model_index.json or folders with checkpoints of the release, but"
            f" {source.location} does not."
        )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # A class name with a module makes diffusers run the saved code, even for the class that is here already.
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        # Our components are taken from this package, whatever module they came from when they were saved.
        init_dict, unused_kwargs, hidden = super().extract_init_dict(config_dict, **kwargs)
        for name, value in init_dict.items():
            if isinstance(value, list | tuple) and len(value) == 2 and value[1] in COMPONENT_CLASSES:
                init_dict[name] = [COMPONENT_CLASSES[value[1]].__module__, value[1]]
        return init_dict, unused_kwargs, hidden

    def _write_index_and_code(self, folder: Path, repo_id: str, variant: str | None) -> None:
        """Makes `model_index.json` one that diffusers understands without this package, and writes its code."""
        path = folder / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        code = {}
        for name, value in index.items():
            if isinstance(value, list) and str(value[0]).startswith(f"{PACKAGE}."):
                code[name] = travelling_files(value[0])
                write_code(folder / name, f"load_{name}", type(getattr(self, name)), code[name])
                value[0] = f"load_{name}"
        if type(self).__module__.startswith(f"{PACKAGE}."):  # a class that somebody derived is not ours to copy
            index["_class_name"] = ["load_pipeline", type(self).__name__]
            known = {file for files in code.values() for file in files}
            files = {file: text for file, text in travelling_files(type(self).__module__).items() if file not in known}
            write_code(folder, "load_pipeline", type(self), files, code)
            write_modular_index(folder, self, repo_id, variant, code)
        if "unet" in code:
            # For `AutoModel`, which reads no other config where this one is; hidden from the pipeline's own arguments.
            index["auto_map"] = {"AutoModel": f"load_unet.{type(self.unet).__name__}"}
            index["_use_default_values"] = {"auto_map": None}
        if os.path.exists(index.get("_name_or_path") or ""):
            del index["_name_or_path"]  # a path of this machine
        _write(path, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        Saves the pipeline as a folder that diffusers loads, with a model card and the code it needs.

        A model card (`README.md`) that is already there is kept.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, created if need be.
            safe_serialization (`bool`, defaults to `True`): Write safetensors instead of pickles.
            variant (`str`, *optional*): Saves the weights as `diffusion_pytorch_model.<variant>.safetensors`.
            max_shard_size (`int` or `str`, *optional*): Largest file, in bytes or such as `"5GB"`.
            push_to_hub (`bool`, defaults to `False`): Also upload the folder.
            kwargs: Arguments of the upload: `repo_id` (the folder's name if not given), `commit_message`, `private`,
                `token`, `create_pr`.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a folder, but {folder} is a file.")
        push_kwargs = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        super().save_pretrained(
            folder,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **kwargs,
        )
        repo_id = push_kwargs.get("repo_id", folder.absolute().name)
        self._write_index_and_code(folder, repo_id, variant)
        facts = weight_facts(self)
        if facts is not None:
            _write(folder / FACTS_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        if not (folder / "README.md").exists():
            make_model_card(self, repo_id).save(folder / "README.md")
        if push_to_hub:
            self._push(folder, **push_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ):
        """
        Uploads the pipeline to the hub, with a model card (unless the repository has one) and the code it needs.

        Args:
            repo_id (`str`): The repository, created if need be.
            commit_message (`str`, *optional*): Message of the commit.
            private (`bool`, *optional*): Whether a new repository is private.
            token (`str`, *optional*): Token that may write to the repository; that of `hf auth login` if not given.
            create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
            safe_serialization (`bool`, defaults to `True`): Upload safetensors instead of pickles.
            variant (`str`, *optional*): As in [`save_pretrained`].
            subfolder (`str`, *optional*): Folder of the repository.

        Returns:
            `huggingface_hub.CommitInfo`: The commit.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, repo_id=repo_id)
            return self._push(Path(folder), repo_id, commit_message, private, token, create_pr, subfolder)

    def _push(
        self,
        folder: Path,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ):
        repo_id = create_repo(repo_id or folder.absolute().name, private=private, token=token, exist_ok=True).repo_id
        readme = f"{subfolder}/README.md" if subfolder else "README.md"
        keeps_card = HfApi(token=token).file_exists(repo_id, readme)
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            ignore_patterns="README.md" if keeps_card else None,
        )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
