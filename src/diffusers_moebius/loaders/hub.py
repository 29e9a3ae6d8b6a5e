"""Pipelines in folders and repositories: both published layouts are read, and one that diffusers loads is written."""

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from . import TINY_AUTOENCODER
from .model_card import FACTS_FILE, make_model_card, weight_facts
from .release_checkpoint import (
    DEFAULT_CHECKPOINT,
    RELEASE_VAE_REPOSITORY,
    component_dtype,
    default_guidance_scale,
    find_release_weights,
    load_release_components,
    make_release_scheduler,
    weight_names,
)
from .travelling_code import COMPONENT_CLASSES, write_indexes_and_code

logger = logging.get_logger(__name__)

PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


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
        if in_root and "unet/model.onnx" in source.files:
            raise ValueError(
                f"{source.location} holds ONNX graphs: load them with `diffusers_moebius.export.load_onnx_pipeline`."
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

    def use_tiny_decoder(self, tiny_vae: str | os.PathLike | ModelMixin = TINY_AUTOENCODER, **hub_kwargs):
        """
        Decodes with a tiny autoencoder that has the same latents; `vae` still encodes.

        Args:
            tiny_vae (`str`, `os.PathLike` or [`AutoencoderTiny`], defaults to `"madebyollin/taesdxl"`): The
                autoencoder, its folder or its repository. The default has the latents of the published models.
            hub_kwargs: As in diffusers' `from_pretrained`.

        Returns:
            [`MoebiusInpaintPipeline`]: The same object.

        Raises:
            ValueError: If its latents have another number of channels.
            OSError: If it is neither there nor in the cache, and the hub does not give it.
        """
        tiny_vae = load_vae(tiny_vae, self.vae.dtype, **hub_kwargs)
        channels, expected = tiny_vae.config.latent_channels, self.vae.config.latent_channels
        if channels != expected:
            raise ValueError(f"`tiny_vae` must have latents of {expected} channels, as `vae` has, but has {channels}.")
        self.register_modules(tiny_vae=tiny_vae.to(self.device))
        return self

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
            path = source.path(find_release_weights(source, folder, variant, use_safetensors))
            kwargs = {**load_release_components(path, config, dtype, disable_mmap), **kwargs}
        kwargs.setdefault("scheduler", make_release_scheduler())
        kwargs.setdefault("default_guidance_scale", default_guidance_scale(folder))
        vae = RELEASE_VAE_REPOSITORY if vae is None else vae
        vae = load_vae(vae, dtype, variant, use_safetensors, **source.kwargs_elsewhere)
        pipeline = cls(vae=vae, **kwargs)
        pipeline.register_to_config(_name_or_path=source.location)
        return pipeline

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # Private in diffusers, but the one place that sees `model_index.json` first: a class name with a module makes
        # diffusers run the saved code, even for the class that is here already.
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
        repo_id = push_kwargs.setdefault("repo_id", folder.absolute().name)
        super().save_pretrained(
            folder,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **kwargs,
        )
        write_indexes_and_code(folder, self, repo_id, variant)
        facts = weight_facts(self)
        if facts is not None:
            text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
            (folder / FACTS_FILE).write_text(text, encoding="utf-8")
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
            options = {"commit_message": commit_message, "create_pr": create_pr}
            return self._push(Path(folder), repo_id, private, token, subfolder, **options)

    def _push(self, folder: Path, repo_id: str, private=None, token=None, subfolder=None, **kwargs):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        readme = f"{subfolder}/README.md" if subfolder else "README.md"
        keeps_card = HfApi(token=token).file_exists(repo_id, readme)
        kwargs["commit_message"] = kwargs.get("commit_message") or f"Upload {type(self).__name__}"
        kwargs["ignore_patterns"] = "README.md" if keeps_card else None
        return upload_folder(repo_id=repo_id, folder_path=folder, path_in_repo=subfolder, token=token, **kwargs)
