"""Writes a pipeline as ONNX graphs, checks them by running them, and describes them in a card."""

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..loaders.model_card import hub_repository, weight_facts
from ..models.fusion import remove_fused_adapters
from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.linear_attention import GatedLinearAttention
from ..pictures.files import replace_folder
from .onnx_layers import prepare_unet
from .onnx_pipeline import GRAPH_FILE, WEIGHTS_FILE, load_onnx_pipeline

OPSET = 18
DTYPES = ("float32", "float16")
# Largest difference to PyTorch, relative to the largest value: rounding of the sums, or of the weights to float16.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2}

SPATIAL = {0: "batch", 2: "height", 3: "width"}

CARD = """---
license: apache-2.0
library_name: onnx
pipeline_tag: image-to-image
tags: [inpainting, image-inpainting, moebius, onnx, onnxruntime-web]{base_model}
---

# {title}

ONNX graphs of a [Moebius](https://arxiv.org/abs/2606.19195) pipeline for image inpainting, written by
`moebius export`.

```python
from diffusers_moebius.export import load_onnx_pipeline

pipe = load_onnx_pipeline("{title}", providers=["CPUExecutionProvider"])
result = pipe(image=photo, mask_image=mask).images[0]
```

| graph | inputs | outputs | weights | MB |
|---|---|---|---|---:|
{graphs}

Inputs and outputs are float32, and so are all sums; batch, height and width are free, the latter in multiples of
{multiple} px. `encoder_hidden_states` is the category: 0 is background, 1 is foreground. Its keys and values are part
of the graph.

## Checked

Run by ONNX Runtime on the CPU against the float32 weights in PyTorch, with random inputs. Difference: the largest one,
relative to the largest value.

| graph | pixels | difference |
|---|---|---:|
{checks}
{about}"""


class _UNetGraph(nn.Module):
    """The U-Net with tensors alone as arguments and results."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _EncoderGraph(nn.Module):
    """The autoencoder's encoder: latents, or the parameters of their distribution."""

    def __init__(self, vae: ModelMixin):
        super().__init__()
        self.vae = vae

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        encoded = self.vae.encode(sample)
        return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents


class _DecoderGraph(nn.Module):
    """The autoencoder's decoder."""

    def __init__(self, vae: ModelMixin):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def export_onnx(
    pipeline,
    target: str | os.PathLike,
    sizes: Sequence[tuple[int, int]] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """
    Writes a pipeline as ONNX graphs: `unet`, `vae_encoder` and `vae_decoder`, each with its `model.onnx` and, in
    `model.onnx_data`, its weights.

    Every graph serves every size, and each is run and compared with PyTorch before the folder gets its name.

    Args:
        pipeline ([`MoebiusInpaintPipeline`]): The pipeline, which stays as it is. Its U-Net is a
            [`MoebiusUNet2DModel`] without gated linear attention.
        target (`str` or `os.PathLike`): The folder to be written.
        sizes (`Sequence[tuple[int, int]]`, *optional*): Heights and widths in pixels at which the graphs are compared;
            the native size and one that is not square by default.
        dtype (`str`, defaults to `"float32"`): Type in which the weights of U-Net and decoder are stored. They are
            float32 again once loaded: no sum can overflow. The encoder's stay float32.
        overwrite (`bool`, defaults to `False`): Replace an exported folder that is already at `target`.

    Returns:
        `Path`: The folder written.

    Raises:
        ValueError: If an argument is not as described, or a graph does not do what its model does.
    """
    target = Path(target).absolute()
    multiple, native = pipeline.sizes.multiple, pipeline.sizes.native
    sizes = [(native, native), (native // 2 // multiple * multiple or multiple, native)] if sizes is None else sizes
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    for height, width in sizes:
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise ValueError(f"`sizes` must be positive multiples of {multiple}, but one is {height}x{width}.")
    unet = pipeline.unet
    if not hasattr(unet, "encoder_hid_proj") or any(isinstance(m, GatedLinearAttention) for m in unet.modules()):
        raise ValueError("`pipeline` has a U-Net with gated linear attention, for which there is no ONNX form.")
    if getattr(unet, "is_fused", False):
        raise ValueError("`pipeline` has been prepared for inference and cannot be exported; load it again.")
    if target.exists() and not overwrite:
        raise ValueError(f"`target` must not exist, but {target} does; `overwrite` replaces an exported folder.")
    if target.exists() and not (target / "unet" / GRAPH_FILE).is_file():
        raise ValueError(f"`target` is only overwritten if it is an exported folder, but {target} is not.")

    with replace_folder(target) as folder:
        _write_folder(pipeline, folder, dtype)
        checks = _check_folder(pipeline, folder, sizes, TOLERANCES[dtype])
        (folder / "README.md").write_text(_make_card(pipeline, folder, dtype, checks), encoding="utf-8")
    return target


def _write_folder(pipeline, folder: Path, dtype: str) -> None:
    write_unet(pipeline.unet, _category_tokens(pipeline), folder / "unet", dtype)
    vae = copy.deepcopy(pipeline.vae).float().eval().requires_grad_(False)

    size = (8, 16)  # latents to trace with
    pixels = tuple(pipeline.vae_scale_factor * length for length in size)
    encoded = "latent_sample" if _is_deterministic(vae) else "latent_parameters"
    samples, axes = (torch.zeros(2, vae.config.in_channels, *pixels),), {"sample": SPATIAL}
    _write_graph(_EncoderGraph(vae), samples, axes, encoded, folder / "vae_encoder", vae.config, "float32")
    samples, axes = (torch.zeros(2, pipeline.unet.config.out_channels, *size),), {"latent_sample": SPATIAL}
    _write_graph(_DecoderGraph(vae), samples, axes, "sample", folder / "vae_decoder", vae.config, dtype)

    # The graph knows the categories by their numbers, so these are all that is left of the embedding.
    embedder = LatentCategoriesEmbedder(num_embeddings=2, embedding_dim=1)
    embedder.embedding_layer.weight.data = torch.tensor([[0.0], [1.0]])
    embedder.save_pretrained(folder / "lcg_embedder")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    graphs = {name: ["diffusers", "OnnxRuntimeModel"] for name in ("unet", "vae_encoder", "vae_decoder")}
    settings = {name: value for name, value in pipeline.config.items() if name.startswith("default_")}
    index = {
        "_class_name": "MoebiusInpaintPipeline",
        "_diffusers_version": diffusers.__version__,
        "lcg_embedder": ["diffusers_moebius", "LatentCategoriesEmbedder"],
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        "vae_scale_factor": pipeline.vae_scale_factor,
        **graphs,
        **settings,
    }
    _write_json(folder / "model_index.json", index)
    # By which a browser knows how much there is to load, and whether it has it whole.
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for name in graphs
        for path in sorted((folder / name).glob(f"{GRAPH_FILE}*"))
    }
    _write_json(folder / "files.json", files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_unet(unet: nn.Module, tokens: torch.Tensor, folder: Path, dtype: str = "float32") -> None:
    """
    Writes the graph of a U-Net alone.

    Args:
        unet ([`MoebiusUNet2DModel`]): The U-Net, which stays as it is.
        tokens (`torch.Tensor` of shape `[2, context_length, encoder_hid_dim]`): LCG tokens of background and
            foreground, which become part of the graph.
        folder (`Path`): The folder to be written.
        dtype (`str`, defaults to `"float32"`): As in [`export_onnx`].
    """
    unet = copy.deepcopy(unet).float().eval().requires_grad_(False)
    remove_fused_adapters(unet)
    prepare_unet(unet, tokens)
    side = 2 ** len(unet.config.block_out_channels)
    # Traced on a size that is not square: heights and widths must not be mixed up.
    samples = torch.zeros(2, unet.config.in_channels, side, 2 * side), torch.zeros(1), torch.zeros(2, 1, 1)
    axes = {"sample": SPATIAL, "encoder_hidden_states": {0: "batch"}}
    _write_graph(_UNetGraph(unet), samples, axes, "out_sample", folder, unet.config, dtype)


def _category_tokens(pipeline) -> torch.Tensor:
    """The LCG tokens of background and foreground, `[2, context_length, encoder_hid_dim]`."""
    embedder = pipeline.lcg_embedder
    ids = torch.cat([embedder.category_ids(category) for category in ("background", "foreground")])
    with torch.no_grad():
        return embedder(ids).embeds.float().cpu()


def _is_deterministic(vae: ModelMixin) -> bool:
    side = 2 ** (len(vae.config.get("block_out_channels") or (1,)) + 3)
    with torch.no_grad():
        return not hasattr(vae.encode(torch.zeros(1, vae.config.in_channels, side, side)), "latent_dist")


def _write_graph(
    module: nn.Module,
    samples: tuple[torch.Tensor, ...],
    axes: dict[str, dict[int, str]],
    output: str,
    folder: Path,
    config: dict,
    dtype: str,
) -> None:
    import onnx

    folder.mkdir(parents=True)
    path = folder / GRAPH_FILE
    names = ["sample", "timestep", "encoder_hidden_states"] if len(samples) == 3 else list(axes)
    with warnings.catch_warnings(), torch.no_grad():
        # By tracing, since the exporter by `torch.export` takes many times as long and ties sizes together. Its
        # warnings are of checks of the inputs, which a graph does not have.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            samples,
            path,
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=False,  # what is made of weights would be stored beside them
            input_names=names,
            output_names=[output],
            dynamic_axes={**axes, output: SPATIAL},
        )
    model = onnx.load(path)
    if dtype == "float16":
        _store_as_float16(model)
    _drop_duplicates(model)
    # Within the graph, a runtime would hold the weights several times while it reads them.
    onnx.save(model, path, save_as_external_data=True, location=WEIGHTS_FILE)
    if (weights := folder / WEIGHTS_FILE).is_file():
        weights.chmod(path.stat().st_mode)  # else the owner's alone, and a web server is somebody else
    onnx.checker.check_model(path)
    config = {name: value for name, value in config.items() if name != "_name_or_path"}
    _write_json(folder / "config.json", config)


def _store_as_float16(model, least: int = 256) -> None:
    """Stores the weights of a graph as float16, each with a node that makes float32 of it."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < least:
            continue
        name = weight.name
        values = numpy_helper.to_array(weight).astype(np.float16)
        weight.CopyFrom(numpy_helper.from_array(values, f"{name}_float16"))
        casts.append(helper.make_node("Cast", [weight.name], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])


def _drop_duplicates(model) -> None:
    """Leaves one of the small constants that the tracer writes again for each layer."""
    seen, replaced, nodes = {}, {}, []
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = replaced.get(name, name)
        if node.op_type == "Constant":
            key = node.attribute[0].SerializeToString()
            if key in seen:
                replaced[node.output[0]] = seen[key]
                continue
            seen[key] = node.output[0]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@torch.no_grad()
def _check_folder(
    pipeline, folder: Path, sizes: Sequence[tuple[int, int]], tolerance: float
) -> list[tuple[str, str, float]]:
    """Runs each graph at each size against its model: rows of graph, size and difference."""
    exported = load_onnx_pipeline(folder)
    generator = torch.Generator().manual_seed(0)
    unet, vae, factor = pipeline.unet, pipeline.vae, pipeline.vae_scale_factor
    tokens = _category_tokens(pipeline).to(unet.device, unet.dtype).repeat(2, 1, 1)
    categories = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]
    timestep = torch.tensor([500.0])

    def draw(channels: int, size: tuple[int, int]) -> torch.Tensor:
        return torch.randn(batch, channels, *size, generator=generator)

    rows = []
    for number, (height, width) in enumerate(sizes):
        batch = (1, 3)[number % 2]  # others than the one that was traced
        size = (height // factor, width // factor)
        sample, latents = draw(unet.config.in_channels, size), draw(unet.config.out_channels, size)
        image = draw(vae.config.in_channels, (height, width)).clamp(-1, 1)
        on_unet = {"device": unet.device, "dtype": unet.dtype}
        on_vae = {"device": vae.device, "dtype": vae.dtype}
        pairs = {
            "unet": (
                unet(sample.to(**on_unet), timestep.to(unet.device), tokens[:batch], return_dict=False)[0],
                exported.unet(sample, timestep, categories[:batch], return_dict=False)[0],
            ),
            "vae_encoder": (_EncoderGraph(vae)(image.to(**on_vae)), _EncoderGraph(exported.vae)(image)),
            "vae_decoder": (
                vae.decode(latents.to(**on_vae), return_dict=False)[0],
                exported.vae.decode(latents, return_dict=False)[0],
            ),
        }
        for name, (expected, given) in pairs.items():
            expected = expected.float().cpu()
            difference = ((expected - given).abs().max() / expected.abs().max()).item()
            if not difference <= tolerance:  # NaN is not
                raise ValueError(
                    f"The ONNX graph {name} differs from its model by {difference:.2g} of the largest value at"
                    f" {height}x{width} px; at most {tolerance:.2g} is allowed. Nothing has been written."
                )
            rows.append((name, f"{height}×{width}", difference))
    return rows


def _make_card(pipeline, folder: Path, dtype: str, checks: list[tuple[str, str, float]]) -> str:
    import onnx

    graphs = []
    for name in ("unet", "vae_encoder", "vae_decoder"):
        graph = onnx.load(folder / name / GRAPH_FILE, load_external_data=False).graph
        size = sum(path.stat().st_size for path in (folder / name).glob(f"{GRAPH_FILE}*"))
        cells = [
            f"`{name}/{GRAPH_FILE}`",
            *(", ".join(map(_describe_value, values)) for values in (graph.input, graph.output)),
            "float32" if name == "vae_encoder" else dtype,
            f"{size / 1e6:.1f}",
        ]
        graphs.append(f"| {' | '.join(cells)} |")
    base_model = hub_repository(pipeline.config.get("_name_or_path"))
    facts = weight_facts(pipeline) or {}
    about = [*facts.get("about", []), *facts.get("training_data", [])]
    return CARD.format(
        base_model=f"\nbase_model: {base_model}" if base_model else "",
        title=folder.name,
        graphs="\n".join(graphs),
        multiple=pipeline.sizes.multiple,
        checks="\n".join(f"| `{name}` | {size} | {difference:.1e} |" for name, size, difference in checks),
        about="".join(f"\n{text}\n" for text in ["## About the weights", *about]) if about else "",
    )


def _describe_value(value) -> str:
    shape = ", ".join(size.dim_param or str(size.dim_value) for size in value.type.tensor_type.shape.dim)
    return f"`{value.name}` [{shape}]"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
