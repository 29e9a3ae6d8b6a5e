"""The components of a pipeline whose networks are ONNX graphs, run by ONNX Runtime."""

import json
import os
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DOutput
from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx_data"  # beside the graph, where ONNX Runtime finds it


class OnnxGraph:
    """
    One graph with its config.

    Args:
        folder (`Path`): Where `model.onnx` and `config.json` are.
        providers (`list[str]`): ONNX Runtime's execution providers, the preferred one first.
    """

    def __init__(self, folder: Path, providers: list[str]):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / GRAPH_FILE, options, providers=providers)
        self.config = FrozenDict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        self.output_name = self.session.get_outputs()[0].name

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        feeds = {name: np.ascontiguousarray(value.float().cpu().numpy()) for name, value in inputs.items()}
        return torch.from_numpy(self.session.run(None, feeds)[0])


class OnnxUNet2DModel:
    """
    A U-Net graph in the place of [`MoebiusUNet2DModel`].

    Args:
        graph ([`OnnxGraph`]): The graph.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, graph: OnnxGraph):
        self.graph, self.config = graph, graph.config

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> MoebiusUNet2DOutput | tuple[torch.Tensor]:
        """As [`MoebiusUNet2DModel.forward`], with the category as the only token: 0 background, 1 foreground."""
        if attention_kwargs:
            raise ValueError("`attention_kwargs` is for adapters, which an ONNX graph does not have.")
        timestep = torch.as_tensor(timestep).reshape(-1)[:1]
        sample = self.graph.run(sample=sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states)
        return MoebiusUNet2DOutput(sample=sample) if return_dict else (sample,)

    __call__ = forward


class OnnxAutoencoder:
    """
    The graphs of an encoder and a decoder in the place of an autoencoder of diffusers.

    Args:
        encoder ([`OnnxGraph`]): Gives latents, or the parameters of their distribution.
        decoder ([`OnnxGraph`]): Gives pictures.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, encoder: OnnxGraph, decoder: OnnxGraph):
        self.encoder, self.decoder, self.config = encoder, decoder, encoder.config

    def encode(self, sample: torch.Tensor) -> AutoencoderKLOutput | AutoencoderTinyOutput:
        encoded = self.encoder.run(sample=sample)
        if self.encoder.output_name == "latent_parameters":
            return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(encoded))
        return AutoencoderTinyOutput(latents=encoded)

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        sample = self.decoder.run(latent_sample=latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def load_onnx_pipeline(folder: str | os.PathLike, providers: list[str] | None = None) -> MoebiusInpaintPipeline:
    """
    Loads a pipeline whose networks are the ONNX graphs that [`export_onnx`] wrote.

    Args:
        folder (`str` or `os.PathLike`): The exported folder.
        providers (`list[str]`, *optional*): ONNX Runtime's execution providers, the preferred one first, such as
            `["CoreMLExecutionProvider", "CPUExecutionProvider"]`. The CPU's by default.

    Returns:
        [`MoebiusInpaintPipeline`]: A pipeline like any other, but for training, saving and moving to a device.

    Raises:
        ValueError: If the folder holds no exported graphs.
    """
    folder = Path(folder)
    if not (folder / "unet" / GRAPH_FILE).is_file():
        raise ValueError(f"`folder` must hold ONNX graphs as `moebius export` writes them, but {folder} does not.")
    providers = ["CPUExecutionProvider"] if providers is None else providers
    index = json.loads((folder / MoebiusInpaintPipeline.config_name).read_text(encoding="utf-8"))
    graphs = {name: OnnxGraph(folder / name, providers) for name in ("unet", "vae_encoder", "vae_decoder")}
    return MoebiusInpaintPipeline(
        vae=OnnxAutoencoder(graphs["vae_encoder"], graphs["vae_decoder"]),
        unet=OnnxUNet2DModel(graphs["unet"]),
        lcg_embedder=LatentCategoriesEmbedder.from_pretrained(folder / "lcg_embedder"),
        scheduler=getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler"),
        **{name: value for name, value in index.items() if name.startswith("default_")},
    )
