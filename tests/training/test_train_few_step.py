import json
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from PIL import Image
from runs import UNET, assert_equal_weights, load_script, read_log, run, weights
from safetensors.torch import load_file

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def script():
    return load_script("train_few_step")


def save_teacher(folder, vae_dir, unet, **schedule):
    scheduler = DDIMScheduler(clip_sample=False, **schedule)
    vae = AutoencoderTiny.from_pretrained(vae_dir)
    MoebiusInpaintPipeline(vae, unet, LatentCategoriesEmbedder(6, 8), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path, vae_dir, photo_dir):
    torch.manual_seed(0)
    teacher = save_teacher(tmp_path / "teacher", vae_dir, MoebiusUNet2DModel(**UNET), **ZERO_SNR)
    options = {
        "pretrained_teacher_model_name_or_path": teacher,
        "train_data_dir": photo_dir,
        "resolution": 32,
        "train_batch_size": 4,
        "lr_warmup_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize("method", ["consistency", "adversarial"])
def test_what_comes_out_is_fast_by_itself(script, command, photo_dir, tmp_path, lpips_file, method):
    out = tmp_path / "out"
    validation = [f"--validation_data={photo_dir}", "--validation_steps=3", "--num_validation_images=2"]
    validation += ["--teacher_inference_steps=3", f"--lpips_weights={lpips_file}"]
    options = [f"--method={method}", "--max_train_steps=3", "--num_inference_steps=2", "--use_ema"]
    before = weights(tmp_path / "teacher")
    script.main([*command, *validation, *options, f"--output_dir={out}"])

    pipeline = MoebiusInpaintPipeline.from_pretrained(out)
    timesteps = []
    pipeline(
        Image.new("RGB", (32, 32), "red"),
        Image.new("L", (32, 32), 255),
        callback_on_step_end=lambda pipe, step, t, kwargs: timesteps.append((int(t), pipe.guidance_scale)) or {},
    )
    assert timesteps == [(999, 1.0), (499, 1.0)]
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline.use_few_steps().config.default_num_inference_steps == 2  # `--fast` leaves it
    assert any(not torch.equal(before[name], value) for name, value in weights(out).items())
    after = weights(tmp_path / "teacher")
    assert all(torch.equal(before[name], after[name]) for name in before)

    rows = read_log(out)
    names = ["loss", "to_target"] + ["discriminator", "r1"] * (method == "adversarial")
    assert len(rows) == 3 and all(float(row[name]) > 0 for row in rows for name in names)
    # input, teacher, the teacher at few steps and the student at 1, 2 and 4, photo
    assert Image.open(out / "validation-3.png").size == (2 * 32, 9 * (32 + 14))
    scores = json.loads((out / "validation-3.json").read_text())
    assert {
        f"student, {n}: {kind} to {other}"
        for n in (1, 2, 4)
        for kind in ("PSNR", "LPIPS")
        for other in ("teacher", "photo")
    } <= set(scores)
    assert "student, 4: PSNR to teacher" in (out / "README.md").read_text()


@pytest.mark.parametrize("method", ["consistency", "adversarial"])
@pytest.mark.parametrize("rank", [None, 2])
def test_resumed_run_ends_with_the_same_weights(script, command, tmp_path, method, rank):
    command = [
        *command,
        f"--method={method}",
        "--use_ema",
        "--max_train_steps=4",
        "--teacher_guidance_scale",
        "1",
        "3",
    ]
    command += [f"--cache_latents={tmp_path / 'cache'}"] + [f"--rank={rank}"] * (rank is not None)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    script.main([*command, f"--output_dir={whole}", "--checkpointing_steps=2"])
    resumed.mkdir()
    shutil.move(whole / "checkpoint-2", resumed)
    script.main([*command, f"--output_dir={resumed}", "--resume_from_checkpoint=checkpoint-2"])
    if rank is None:
        assert_equal_weights(whole, resumed)
        return
    first, second = load_file(whole / LORA_FILE), load_file(resumed / LORA_FILE)
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    assert not (whole / "unet").exists()
    card = (whole / "README.md").read_text()
    assert "moebius inpaint" not in card  # which could not set the scheduler
    # The card's own lines make the teacher with the adapter fast.
    pipe = MoebiusInpaintPipeline.from_pretrained(tmp_path / "teacher")
    pipe.load_lora_weights(whole)
    setup = [line for line in card.splitlines() if line.startswith(("pipe.scheduler", "pipe.register_to_config"))]
    exec("\n".join(setup), {"pipe": pipe})
    assert (pipe.config.default_num_inference_steps, pipe.config.default_guidance_scale) == (4, 1.0)


def test_a_student_of_a_consistent_teacher_learns_to_match_its_path(script, command, tmp_path):
    """Trained on, the loss falls: the student gets nearer to its own earlier point on the teacher's path."""
    out = tmp_path / "out"
    options = ["--max_train_steps=40", "--learning_rate=3e-3", "--loss_type=l2", "--num_inference_steps=1"]
    script.main([*command, *options, f"--output_dir={out}", f"--cache_latents={tmp_path / 'cache'}"])
    losses = [float(row["loss"]) for row in read_log(out)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(
    ("solver_steps", "scale", "expected"),
    [
        (4, 1.0, True),  # a phase for each step of the teacher, whose step the target then is
        (4, 3.0, False),  # guidance is what is missing
        (8, 1.0, False),  # so is the second step of a phase
    ],
)
def test_a_student_begins_level_with_its_teacher(script, command, tmp_path, solver_steps, scale, expected):
    out = tmp_path / "out"
    options = [f"--num_solver_steps={solver_steps}", "--num_inference_steps=4", f"--teacher_guidance_scale={scale}"]
    script.main([*command, *options, "--max_train_steps=1", f"--output_dir={out}"])
    (row,) = read_log(out)
    assert (float(row["to_target"]) < 1e-9) == expected, row


def test_other_kinds_of_teachers(script, command, vae_dir, tmp_path):
    config = {name: value for name, value in UNET.items() if name not in ("context_length", "local_window_size")}
    teacher = save_teacher(tmp_path / "hacker", vae_dir, PixelHackerUNet2DModel(**config))  # predicts noise
    arguments = [f"--pretrained_teacher_model_name_or_path={teacher}", f"--output_dir={tmp_path / 'out'}"]
    options = ["--method=adversarial", "--max_train_steps=1", "--gradient_checkpointing", "--mixed_precision=bf16"]
    script.main([*command, *arguments, *options])
    assert float(read_log(tmp_path / "out")[0]["loss"]) > 0
    with pytest.raises(ValueError, match="`prediction_type` is 'epsilon'"):
        script.main([*command, *arguments, f"--pretrained_model_name_or_path={tmp_path / 'teacher'}"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["consistency", "adversarial"])
def test_two_processes_are_one_with_the_doubled_batch(command, tmp_path, method):
    command = [*command, f"--cache_latents={tmp_path / 'cache'}", "--max_train_steps=2", f"--method={method}"]
    results = []
    for num_processes in (1, 2):
        out = tmp_path / f"{num_processes}"
        options = [f"--output_dir={out}", f"--train_batch_size={4 // num_processes}"]
        run("train_few_step", [*command, *options], num_processes)
        results.append(torch.cat([value.flatten() for value in weights(out).values()]))
    before = torch.cat([value.flatten() for value in weights(tmp_path / "teacher").values()])
    # AdamW's first steps divide by the gradient, so where that is near zero, rounding shows.
    assert (results[0] - results[1]).norm() < 2e-2 * (results[0] - before).norm()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--num_solver_steps=30"], "--num_solver_steps"),
        (["--num_inference_steps=3"], "--num_inference_steps"),
        (["--teacher_guidance_scale", "1", "2", "3"], "--teacher_guidance_scale"),
        (["--prediction_type=epsilon"], "--prediction_type"),
        (["--rank=0"], "--rank"),
        (["--validation_inference_steps=3"], "--validation_inference_steps"),
        (["--method=progressive"], "--method"),
    ],
)
def test_bad_options_are_named(script, command, tmp_path, capsys, options, named):
    with pytest.raises(SystemExit):
        script.main([*command, *options, f"--output_dir={tmp_path / 'out'}"])
    assert named in capsys.readouterr().err
