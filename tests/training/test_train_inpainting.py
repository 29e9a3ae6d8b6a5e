import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from PIL import Image
from runs import UNET, assert_equal_weights, load_script, read_log, weights

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


@pytest.fixture(scope="module")
def script():
    return load_script("train_inpainting")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_ends_with_the_same_parameters(script, command, tmp_path, optimizer):
    command = [*command, f"--optimizer={optimizer}", f"--cache_latents={tmp_path / 'cache'}", "--max_train_steps=6"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    script.main([*command, f"--output_dir={whole}", "--checkpointing_steps=3"])
    # The second run has only the first one's checkpoint of step 3 to go on from.
    resumed.mkdir()
    (whole / "checkpoint-3").rename(resumed / "checkpoint-3")
    script.main([*command, f"--output_dir={resumed}", "--resume_from_checkpoint=latest", "--checkpointing_steps=99"])
    assert_equal_weights(whole, resumed)
    start, end = weights(resumed / "checkpoint-3"), weights(whole)
    assert not torch.equal(start["conv_in.conv_pw.weight"], end["conv_in.conv_pw.weight"])


def test_pictures_train_the_decoder_too(script, command, tmp_path, vae_dir, lpips_file):
    command = [*command, f"--lpips_weights={lpips_file}", "--lpips_weight=2", "--l1_weight=0.5", "--max_train_steps=6"]
    whole, resumed, frozen = (tmp_path / name for name in ("whole", "resumed", "frozen"))
    script.main([*command, f"--output_dir={whole}", "--train_decoder", "--checkpointing_steps=3"])
    resumed.mkdir()
    (whole / "checkpoint-3").rename(resumed / "checkpoint-3")
    script.main([*command, f"--output_dir={resumed}", "--train_decoder", "--resume_from_checkpoint=latest"])
    script.main([*command, f"--output_dir={frozen}"])
    assert_equal_weights(whole, resumed)
    before = AutoencoderTiny.from_pretrained(vae_dir).state_dict()
    after, again, kept = (
        AutoencoderTiny.from_pretrained(folder, subfolder="vae").state_dict() for folder in (whole, resumed, frozen)
    )
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"decoder"}
    for name, value in before.items():
        torch.testing.assert_close(after[name], again[name], rtol=0, atol=0)
        torch.testing.assert_close(kept[name], value, rtol=0, atol=0)
    rows = read_log(whole)
    assert all(float(row[name]) > 0 for row in rows for name in ("loss", "hole_error", "l1", "lpips"))


def test_accumulated_gradients_and_other_objective(script, command, tmp_path):
    out = tmp_path / "out"
    options = ["--gradient_accumulation_steps=2", "--snr_gamma=5", "--hole_loss_weight=4", "--timestep_bias=2"]
    command = [argument for argument in command if argument not in ("--rescale_betas_zero_snr", "--use_ema")]
    command += ["--prediction_type=epsilon", "--last_timestep_probability=0.5", "--gradient_checkpointing", *options]
    script.main([*command, f"--output_dir={out}", "--max_train_steps=4"])
    rows = read_log(out)
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(0 < float(row[name]) < 100 for row in rows for name in ("loss", "hole_error"))
    assert DDIMScheduler.from_pretrained(out, subfolder="scheduler").config.prediction_type == "epsilon"


def test_fine_tuning_a_pipeline_from_shards_with_validation(script, tmp_path, vae_dir, shard, photo_dir):
    source, out = tmp_path / "source", tmp_path / "out"
    torch.manual_seed(0)
    pipeline = MoebiusInpaintPipeline(
        vae=AutoencoderTiny.from_pretrained(vae_dir),
        unet=MoebiusUNet2DModel(**UNET),
        lcg_embedder=LatentCategoriesEmbedder(6, 8),
        scheduler=DDIMScheduler(),
    )
    pipeline.save_pretrained(source)
    script.main(
        [
            f"--pretrained_model_name_or_path={source}",
            f"--train_shards_path_or_url={shard}",
            f"--validation_data={photo_dir}",
            f"--output_dir={out}",
            "--validation_steps=2",
            "--num_validation_images=3",
            "--resolution=32",
            "--train_batch_size=4",
            "--max_train_steps=2",
            "--use_ema",
        ]
    )
    assert Image.open(out / "validation-2.png").size == (3 * 32, 3 * (32 + 14))
    before, after = weights(source), weights(out)
    assert before.keys() == after.keys()
    assert not torch.equal(before["conv_out.conv_pw.weight"], after["conv_out.conv_pw.weight"])


def test_frozen_batch_norm_keeps_its_statistics_through_a_run(script, command, tmp_path):
    out = tmp_path / "out"
    options = [f"--output_dir={out}", "--max_train_steps=3", f"--cache_latents={tmp_path / 'cache'}"]
    script.main([*command, *options, "--freeze_batch_norm"])
    frozen = weights(out)
    means = [value for name, value in frozen.items() if name.endswith("running_mean")]
    assert means and not any(mean.any() for mean in means)  # as they were initialised
    script.main([*command, *options])
    live = weights(out)
    assert any(value.any() for name, value in live.items() if name.endswith("running_mean"))
    # Measured anew for the averaged weights, over fifty batches.
    assert all(value == 50 for name, value in live.items() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    "removed, added, named",
    [
        ("--unet_config", [], "--pretrained_model_name_or_path"),
        ("--vae", [], "--vae"),
        ("--prediction_type", [], "--rescale_betas_zero_snr"),
        (None, ["--mask_presets=huge"], "--mask_presets"),
        (None, ["--train_timesteps", "1000"], "--train_timesteps"),
        (None, ["--train_decoder"], "--train_decoder"),
        (None, ["--l1_weight=1", "--cache_latents=cache"], "--cache_latents"),
        (None, ["--resume_from_checkpoint=nowhere"], "`resume_from_checkpoint`"),
    ],
)
def test_bad_options_are_named(script, command, tmp_path, capsys, removed, added, named):
    kept = [argument for argument in command if removed is None or not argument.startswith(removed + "=")]
    with pytest.raises((SystemExit, ValueError)) as error:
        script.main([*kept, *added, f"--output_dir={tmp_path / 'out'}"])
    assert named in str(error.value) + capsys.readouterr().err
