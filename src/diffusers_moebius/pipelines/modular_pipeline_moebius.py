"""The modular pipeline of Moebius."""

import os

from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import ComponentsManager, ModularPipeline, ModularPipelineBlocks
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..loaders.lora import MoebiusLoraLoaderMixin
from .modular_blocks_moebius import MoebiusAutoBlocks
from .pipeline_moebius_inpaint import MoebiusInpaintPipeline


class MoebiusModularPipeline(ModularPipeline, MoebiusLoraLoaderMixin):
    """
    A pipeline of blocks that fills the marked part of photos with Moebius.

    Args:
        blocks ([`ModularPipelineBlocks`], *optional*): The blocks; by default [`MoebiusAutoBlocks`], which do what
            [`MoebiusInpaintPipeline`] does, for photos that work at one size.
        kwargs: See [`ModularPipeline`].
    """

    def __init__(self, blocks: ModularPipelineBlocks | None = None, *args, **kwargs):
        super().__init__(MoebiusAutoBlocks() if blocks is None else blocks, *args, **kwargs)

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline | ModularPipeline,
        blocks: ModularPipelineBlocks | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
    ) -> "MoebiusModularPipeline":
        """
        A modular pipeline that shares the components and defaults of another pipeline.

        Args:
            pipeline ([`MoebiusInpaintPipeline`] or [`ModularPipeline`]): The other pipeline.
            blocks ([`ModularPipelineBlocks`], *optional*): The blocks; by default [`MoebiusAutoBlocks`].
            components_manager ([`ComponentsManager`], *optional*): Manages the components, also for other pipelines.
            collection (`str`, *optional*): Name of the collection in the manager.
        """
        modular = cls(blocks, components_manager=components_manager, collection=collection)
        shared = {name: each for name, each in pipeline.components.items() if name in modular.component_names}
        defaults = {name: value for name, value in pipeline.config.items() if name in modular._config_specs}
        settings = pipeline.config.get("default_guidance_scale"), pipeline.config.get("default_guidance_start")
        if "guider" in modular.component_names and "guider" not in shared and None not in settings:
            guidance = dict(zip(("guidance_scale", "start"), settings))
            shared["guider"] = modular.get_component_spec("guider").create(guidance)
        modular.update_components(**shared, **defaults)
        return modular

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        blocks: ModularPipelineBlocks | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
        **kwargs,
    ) -> "MoebiusModularPipeline":
        """
        Loads a modular pipeline with its components, by whatever [`MoebiusInpaintPipeline.from_pretrained`] takes.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or repository, of either layout.
            blocks ([`ModularPipelineBlocks`], *optional*): The blocks; by default [`MoebiusAutoBlocks`].
            components_manager ([`ComponentsManager`], *optional*): Manages the components, also for other pipelines.
            collection (`str`, *optional*): Name of the collection in the manager.
            kwargs: See [`MoebiusInpaintPipeline.from_pretrained`].
        """
        pipeline = MoebiusInpaintPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls.from_pipe(pipeline, blocks, components_manager, collection)

    def _as_inpaint_pipeline(self) -> MoebiusInpaintPipeline:
        models, settings = MoebiusInpaintPipeline._get_signature_keys(MoebiusInpaintPipeline)
        arguments = {name: each for name, each in self.components.items() if name in models}
        arguments |= {name: value for name, value in self.config.items() if name in settings}
        if isinstance(self.guider, ClassifierFreeGuidance):
            arguments["default_guidance_scale"] = self.guider.config.guidance_scale
            arguments["default_guidance_start"] = self.guider.config.start
        return MoebiusInpaintPipeline(**arguments)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Saves components and defaults as a folder that [`MoebiusInpaintPipeline`], [`DiffusionPipeline`] and
        [`ModularPipeline`] load, the last one with [`MoebiusAutoBlocks`]: blocks of your own are not saved.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, created if need be.
            kwargs: See [`MoebiusInpaintPipeline.save_pretrained`].
        """
        self._as_inpaint_pipeline().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Uploads what [`save_pretrained`] saves.

        Args:
            repo_id (`str`): The repository, created if need be.
            kwargs: See [`MoebiusInpaintPipeline.push_to_hub`].

        Returns:
            `huggingface_hub.CommitInfo`: The commit.
        """
        return self._as_inpaint_pipeline().push_to_hub(repo_id, **kwargs)
