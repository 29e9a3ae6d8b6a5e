import hashlib
import json

import onnx
import pytest
import torch
from random_pipeline import make_pipeline

from diffusers_moebius.export import export_onnx, load_onnx_pipeline

GRAPHS = ("unet", "vae_encoder", "vae_decoder")
# Not to be had, or wrong, in browsers.
FORBIDDEN = {"Einsum", "ScatterElements", "ScatterND", "GatherND", "Loop", "If", "Scan", "BatchNormalization"}


def graph_of(folder, name):
    path = folder / name / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    return onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True).graph


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_hold_what_browsers_run(exported, name):
    graph = graph_of(exported, name)
    assert {node.op_type for node in graph.node}.isdisjoint(FORBIDDEN)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    ranks |= {weight.name: len(weight.dims) for weight in graph.initializer}
    assert max(ranks.values()) <= 4
    produced = {output for node in graph.node for output in node.output} - {value.name for value in graph.output}
    assert produced <= set(ranks)  # of no value it is left open how many dimensions it has


def test_folder_has_the_layout_of_optimum(exported, kl_pipeline):
    index = json.loads((exported / "model_index.json").read_text())
    assert {name for name in index if isinstance(index[name], list)} == {*GRAPHS, "lcg_embedder", "scheduler"}
    assert index["default_num_inference_steps"] == kl_pipeline.config.default_num_inference_steps
    assert json.loads((exported / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    config = json.loads((exported / "vae_encoder" / "config.json").read_text())
    assert config["scaling_factor"] == 0.13025


def test_card_tells_the_differences(exported):
    card = (exported / "README.md").read_text()
    rows = [line.split("|") for line in card.splitlines() if "×" in line]
    assert {(row[1].strip(" `"), row[2].strip()) for row in rows} == {
        (name, size) for name in GRAPHS for size in ("128×128", "64×128")
    }
    assert all(0 < float(row[3]) < 1e-4 for row in rows)


def test_export_leaves_the_pipeline_as_it_is(kl_pipeline, tmp_path):
    before = {name: weight.clone() for name, weight in kl_pipeline.unet.state_dict().items()}
    config = dict(kl_pipeline.unet.config)
    export_onnx(kl_pipeline, tmp_path / "graphs", sizes=[(32, 64)])
    after = kl_pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert dict(kl_pipeline.unet.config) == config


def test_float16_halves_unet_and_decoder_alone(exported, kl_pipeline, tmp_path):
    folder = export_onnx(kl_pipeline, tmp_path / "half", dtype="float16")
    sizes = {name: (folder / name / "model.onnx_data").stat().st_size for name in GRAPHS}
    full = {name: (exported / name / "model.onnx_data").stat().st_size for name in GRAPHS}

    def weights(graph):
        return sum(onnx.numpy_helper.to_array(weight).nbytes for weight in graph.initializer)

    assert weights(graph_of(folder, "unet")) < 0.55 * weights(graph_of(exported, "unet"))
    assert sizes["vae_decoder"] < full["vae_decoder"]
    assert sizes["vae_encoder"] == full["vae_encoder"]
    unet = load_onnx_pipeline(folder).unet
    sample = torch.randn(1, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    given = unet(sample, 500, torch.zeros(1, 1, 1)).sample
    expected = load_onnx_pipeline(exported).unet(sample, 500, torch.zeros(1, 1, 1)).sample
    assert 0 < (given - expected).abs().max() / expected.abs().max() < 2e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"cross_attention_type": "softmax", "feed_forward_type": "geglu", "conv_type": "full"},
        {"block_out_channels": (16, 32), "layers_per_block": 1, "context_length": 10},
    ],
)
def test_other_architectures(settings, tiny_autoencoder, tmp_path):
    pipeline = make_pipeline(tiny_autoencoder, **settings)
    folder = export_onnx(pipeline, tmp_path / "graphs", sizes=[(32, 96)])
    assert [output.name for output in graph_of(folder, "vae_encoder").output] == ["latent_sample"]
    assert {node.op_type for node in graph_of(folder, "unet").node}.isdisjoint(FORBIDDEN)


def test_graph_that_differs_leaves_nothing_behind(tiny_autoencoder, tmp_path):
    pipeline = make_pipeline(tiny_autoencoder)
    pipeline.unet.conv_norm_out.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"unet differs .* Nothing has been written"):
        export_onnx(pipeline, tmp_path / "graphs", sizes=[(32, 32)])
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_exported_folders_alone(kl_pipeline, tmp_path):
    target = tmp_path / "graphs"
    target.mkdir()
    (target / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match="`target` must not exist"):
        export_onnx(kl_pipeline, target)
    with pytest.raises(ValueError, match="only overwritten if it is an exported folder"):
        export_onnx(kl_pipeline, target, overwrite=True)
    assert (target / "thesis.txt").exists()
    (target / "unet").mkdir()
    (target / "unet" / "model.onnx").write_bytes(b"old")
    export_onnx(kl_pipeline, target, sizes=[(32, 32)], overwrite=True)
    assert not (target / "thesis.txt").exists()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "`dtype` must be one of float32, float16, but is 'int8'"),
        ({"sizes": [(128, 100)]}, "`sizes` must be positive multiples of 32, but one is 128x100"),
        ({"sizes": [(0, 32)]}, "`sizes` must be positive multiples of 32"),
    ],
)
def test_bad_arguments(kl_pipeline, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(kl_pipeline, tmp_path / "graphs", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_models_without_an_onnx_form(tiny_autoencoder, tmp_path):
    with pytest.raises(ValueError, match="gated linear attention"):
        export_onnx(make_pipeline(tiny_autoencoder, self_attention_type="gla"), tmp_path / "graphs")
    prepared = make_pipeline(tiny_autoencoder).prepare_for_inference()
    with pytest.raises(ValueError, match="prepared for inference"):
        export_onnx(prepared, tmp_path / "graphs")


def test_list_of_files_fits_them(exported):
    files = json.loads((exported / "files.json").read_text())
    assert files.keys() == {f"{name}/model.{end}" for name in GRAPHS for end in ("onnx", "onnx_data")}
    for name, facts in files.items():
        content = (exported / name).read_bytes()
        assert (exported / name).stat().st_mode == (exported / "files.json").stat().st_mode  # for a web server
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
