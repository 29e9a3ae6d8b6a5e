import shutil

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from runs import UNET, load_script, read_log
from safetensors.torch import load_file

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline
from diffusers_moebius.training.denoiser import TARGET_MODULES

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def script():
    return load_script("train_inpainting")


def save_pipeline(folder, vae_dir, unet):
    pipeline = MoebiusInpaintPipeline(
        vae=AutoencoderTiny.from_pretrained(vae_dir),
        unet=unet,
        lcg_embedder=LatentCategoriesEmbedder(6, 8),
        scheduler=DDIMScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path, vae_dir):
    """A pipeline folder with a student."""
    torch.manual_seed(0)
    return save_pipeline(tmp_path / "source", vae_dir, MoebiusUNet2DModel(**UNET))


@pytest.fixture
def command(source, photo_dir):
    options = {
        "pretrained_model_name_or_path": source,
        "train_data_dir": photo_dir,
        "resolution": 32,
        "train_batch_size": 4,
        "lr_warmup_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "rank": 3,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def predict(pipeline):
    generator = torch.Generator().manual_seed(0)
    sample, context = torch.randn(1, 9, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    with torch.no_grad():
        return pipeline.unet(sample, 500, context).sample


def test_adapter_of_a_run_changes_the_pipeline_that_it_was_made_for(script, command, source, photo_dir, tmp_path):
    out = tmp_path / "out"
    validation = [f"--validation_data={photo_dir}", "--validation_steps=2", "--num_validation_images=3"]
    run = [f"--output_dir={out}", "--max_train_steps=4", "--lora_alpha=6", "--validation_inference_steps=2"]
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    script.main([*command, *validation, *run])
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert [row["step"] for row in read_log(out)] == ["2", "4"]
    assert Image.open(out / "validation-4.png").size == (3 * 32, 4 * (32 + 14))
    assert equal(load_file(out / "checkpoint-4" / FILE), load_file(out / FILE))
    size = sum(path.stat().st_size for path in (out / "checkpoint-4").iterdir())
    assert not list((out / "checkpoint-4").glob("model*")) and size < 2e6

    pipeline = MoebiusInpaintPipeline.from_pretrained(source)
    plain, weights = predict(pipeline), {name: w.clone() for name, w in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(out)
    config = pipeline.unet.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (3, 6)
    assert config.target_modules == {*("to_q", "to_k", "to_v", "proj_in", "proj_out"), *TARGET_MODULES[5:7]}
    assert not torch.allclose(predict(pipeline), plain, rtol=1e-3)
    pipeline.unload_lora_weights()
    assert all(torch.equal(weights[name], weight) for name, weight in pipeline.unet.state_dict().items())

    card = ModelCard.load(out / "README.md")
    assert {"lora", "inpainting"} <= set(card.data.tags)
    assert "--rank 3 --lora_alpha 6.0" in card.text and "Rank 3, beside" in card.text
    assert str(tmp_path) not in card.text and "validation_hole_psnr" in card.text
    # What the card says was run can be run.
    words = card.text.partition("accelerate launch ")[2].partition("\n")[0].split()[1:]
    assert script.parse_args(words).rank == 3


def test_resumed_run_ends_with_the_same_adapter(script, command, tmp_path):
    command = [*command, "--max_train_steps=6", "--lora_dropout=0.3", "--use_ema"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    script.main([*command, f"--output_dir={whole}", "--checkpointing_steps=3"])
    resumed.mkdir()
    shutil.move(whole / "checkpoint-3", resumed)
    script.main([*command, f"--output_dir={resumed}", "--resume_from_checkpoint=latest", "--checkpointing_steps=99"])
    for name in (FILE, "checkpoint-6/adapter.safetensors"):
        assert equal(load_file(whole / name), load_file(resumed / name))
    average, learnt = load_file(whole / FILE), load_file(whole / "checkpoint-6/adapter.safetensors")
    assert not any(torch.equal(average[f"unet.{key}"], learnt[key]) for key in learnt)


def test_teacher_and_chosen_layers(script, command, vae_dir, tmp_path):
    config = {name: value for name, value in UNET.items() if name not in ("context_length", "local_window_size")}
    source = save_pipeline(tmp_path / "teacher", vae_dir, PixelHackerUNet2DModel(**config))
    out = tmp_path / "out"
    arguments = [f"--pretrained_model_name_or_path={source}", f"--output_dir={out}", "--max_train_steps=1"]
    script.main([*command, *arguments, "--gradient_checkpointing", "--target_modules", "q_proj", "attn2.to_out.0"])
    names = {name.rpartition(".lora_")[0].rpartition(".attn")[2] for name in load_file(out / FILE)}
    assert names == {"1.q_proj", "2.to_out.0"}
    pipeline = MoebiusInpaintPipeline.from_pretrained(source)
    pipeline.load_lora_weights(out)
    assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize(
    "options, named",
    [
        (["--target_modules", "to_q", "nowhere"], "nowhere is none"),
        (["--target_modules", "pos_conv"], "LocalPositionConv"),
        (["--target_modules", "depth_conv.conv"], "ungrouped"),
        (["--rank=0"], "`--rank`"),
        (["--lora_dropout=1"], "`--lora_dropout`"),
        (["--prediction_type=epsilon"], "`--prediction_type`"),
    ],
)
def test_bad_options_are_named(script, command, tmp_path, capsys, options, named):
    with pytest.raises((SystemExit, ValueError)) as error:
        script.main([*command, *options, f"--output_dir={tmp_path / 'out'}"])
    assert named in str(error.value) + capsys.readouterr().err
