import json
import sys
import types

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from PIL import Image
from runs import assert_equal_weights, first_gradients, load_script, read_log, run, weights

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

SIZES = {
    "num_attention_heads": 2,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "encoder_hid_dim": 8,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def script():
    return load_script("train_distillation")


def save_teacher(folder, vae_dir, **schedule):
    torch.manual_seed(1)
    # Twenty tokens, as PixelHacker has; another width than the student's but for the compared blocks.
    pipeline = MoebiusInpaintPipeline(
        vae=AutoencoderTiny.from_pretrained(vae_dir),
        unet=PixelHackerUNet2DModel(sample_size=8, block_out_channels=(8, 8, 16, 16), **SIZES),
        lcg_embedder=LatentCategoriesEmbedder(20, 8),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **schedule
        ),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def distil(tmp_path, vae_dir, photo_dir):
    """Arguments of a small distillation; more can be appended."""
    config = tmp_path / "student.json"
    config.write_text(
        '{"sample_size": 8, "block_out_channels": [8, 8, 16], "num_attention_heads": 2, "layers_per_block": 2,'
        ' "cross_attention_dim": 8, "encoder_hid_dim": 8, "local_window_size": 3, "norm_num_groups": 4}'
    )
    options = {
        "unet_config": config,
        "vae": vae_dir,
        "pretrained_teacher_model_name_or_path": save_teacher(tmp_path / "teacher", vae_dir),
        "train_data_dir": photo_dir,
        "cache_latents": tmp_path / "cache",
        "resolution": 64,
        "train_batch_size": 4,
        "lr_warmup_steps": 1,
        "logging_steps": 1,
        "perceptual_loss": "none",
    }
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize("balance", ["paper", "release"])
def test_a_student_is_distilled_and_its_folder_loads(script, distil, tmp_path, photo_dir, balance):
    out = tmp_path / "out"
    validation = [f"--validation_data={photo_dir}", "--validation_steps=3", "--num_validation_images=2"]
    validation += ["--validation_inference_steps=1", "--report_to=tensorboard"]
    script.main(
        [*distil, *validation, f"--output_dir={out}", "--max_train_steps=3", "--use_ema", f"--balance={balance}"]
    )
    rows = read_log(out)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    names = ("loss", "hole_error", "coarse", "fine", "task", "weight_fine", "weight_cross")
    assert all(float(row[name]) > 0 for row in rows for name in names)
    assert Image.open(out / "validation-3.png").size == (2 * 64, 4 * (64 + 14))  # input, teacher, student, photo
    assert json.loads((out / "validation-3.json").read_text())["validation_hole_psnr"] > 0
    assert list((out / "logs").rglob("events.*"))
    card = (out / "README.md").read_text()
    assert "train_distillation.py" in card or "accelerate launch" in card
    assert "36 samples" in card and "![curves](loss.png)" in card and "validation_loss" in card
    assert str(tmp_path) not in card
    pipeline = MoebiusInpaintPipeline.from_pretrained(out)
    photo, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    assert pipeline(photo, mask, num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)


def test_resumed_distillation_ends_with_the_same_parameters(script, distil, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    script.main([*distil, f"--output_dir={whole}", "--max_train_steps=4", "--checkpointing_steps=2"])
    resumed.mkdir()
    (whole / "checkpoint-2").rename(resumed / "checkpoint-2")
    script.main([*distil, f"--output_dir={resumed}", "--max_train_steps=4", "--resume_from_checkpoint=latest"])
    assert_equal_weights(whole, resumed)


def test_the_teacher_matters_and_stays_as_it_was(script, distil, tmp_path):
    before = weights(tmp_path / "teacher")
    results = {}
    for name, losses in (("task", ["task"]), ("fine", ["task", "fine"]), ("coarse", ["task", "coarse"])):
        script.main([*distil, f"--output_dir={tmp_path / name}", "--max_train_steps=2", "--losses", *losses])
        results[name] = weights(tmp_path / name)["conv_in.conv_pw.weight"]
    assert not torch.equal(results["task"], results["fine"])
    assert not torch.equal(results["task"], results["coarse"])
    after = weights(tmp_path / "teacher")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_two_processes_balance_alike(distil, tmp_path):
    distil = [*distil, "--freeze_batch_norm", "--optimizer=adamw", "--max_train_steps=1", "--max_grad_norm=1e9"]
    gradients = []
    for num_processes in (1, 2):
        out = tmp_path / f"{num_processes}"
        options = [f"--output_dir={out}", f"--train_batch_size={4 // num_processes}"]
        run("train_distillation", [*distil, *options], num_processes)
        gradients.append(torch.cat([value.flatten() for value in first_gradients(out / "checkpoint-1")]))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5


def test_the_perceptual_loss_can_be_lpips_of_decoded_latents(script, distil, tmp_path, lpips_file):
    out = tmp_path / "out"
    options = ["--perceptual_loss=lpips", f"--lpips_weights={lpips_file}", f"--output_dir={out}"]
    script.main([*distil, *options, "--max_train_steps=1"])
    (row,) = read_log(out)
    assert float(row["perceptual"]) > 0 and float(row["weight_perceptual"]) > 0


@pytest.mark.parametrize("balance", ["paper", "release"])
def test_elatentlpips_takes_scaled_latents_and_its_l1_term_is_the_releases(
    script, distil, tmp_path, monkeypatch, balance
):
    calls = []

    class Metric(torch.nn.Module):
        """With the signature of the package."""

        def __init__(
            self,
            pretrained=True,
            net="vgg16",
            elatentlpips=True,
            spatial=False,
            pnet_rand=False,
            pnet_tune=False,
            use_dropout=True,
            eval_mode=True,
            verbose=True,
            encoder="sd3",
            augment="bg",
        ):
            super().__init__()
            calls.append((encoder, augment, verbose))

        def forward(self, in0, in1, retPerLayer=False, normalize=False, ensembling=True, add_l1_loss=True):
            calls.append((retPerLayer, normalize, ensembling, add_l1_loss))
            return (in0 - in1).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "elatentlpips", types.SimpleNamespace(ELatentLPIPS=Metric))
    out = tmp_path / "out"
    options = ["--perceptual_loss=elatentlpips", f"--balance={balance}", f"--output_dir={out}"]
    script.main([*distil, *options, "--max_train_steps=1"])
    assert calls == [("sdxl", "bg", False), (False, False, True, balance == "release")]
    assert float(read_log(out)[0]["perceptual"]) > 0


def test_without_its_package_the_perceptual_loss_says_how_to_leave_it_out(script, distil, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "elatentlpips", None)
    monkeypatch.setattr(script, "load_teacher", lambda *arguments: 1 / 0)  # said before anything is loaded
    message = r"pip install diffusers-moebius\[perceptual\]`, whose licence.*`--perceptual_loss none`"
    with pytest.raises(ImportError, match=message):
        script.main([*distil, "--perceptual_loss=elatentlpips", f"--output_dir={tmp_path / 'out'}"])


def test_a_teacher_with_another_noise_schedule_is_refused(script, distil, tmp_path, vae_dir):
    other = save_teacher(tmp_path / "other", vae_dir, prediction_type="v_prediction")
    arguments = [f"--pretrained_teacher_model_name_or_path={other}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="`prediction_type` is 'v_prediction' of the teacher and 'epsilon' of"):
        script.main([*distil, *arguments, "--prediction_type=epsilon"])
    script.main([*distil, *arguments, "--max_train_steps=1"])  # a new student takes it over
    saved = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert saved.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("option", ["--losses=style", "--balance=none", "--pretrained_model_name_or_path=x"])
def test_bad_options_are_named(script, distil, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        script.main([*distil, option, f"--output_dir={tmp_path / 'out'}"])
    assert option.split("=")[0] in capsys.readouterr().err
