import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from lpips_weights import make_weights
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_moebius.training.checkpoints import list_checkpoints
from diffusers_moebius.training.data import PictureReader

SCRIPT = Path(__file__).parents[2] / "training" / "train_tiny_vae.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny_vae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(photo_dir, tmp_path):
    torch.manual_seed(0)
    teacher = AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(1, 0, 0, 0),
    )
    with torch.no_grad():
        teacher.encoder.layers[-1].weight.mul_(30)  # latents of the usual size
    teacher.save_pretrained(tmp_path / "teacher")
    save_file(make_weights("alex"), tmp_path / "alex.safetensors")
    options = {
        "teacher_model_name_or_path": tmp_path / "teacher",
        "train_data_dir": photo_dir,
        "lpips_weights": tmp_path / "alex.safetensors",
        "output_dir": tmp_path / "run",
        "encoder_channels": 4,
        "decoder_channels": 4,
        "resolution": 64,
        "train_batch_size": 2,
        "pool_size": 4,
        "logging_steps": 1,
        "lr_warmup_steps": 2,
    }
    blocks = ["--num_encoder_blocks", "0", "0", "0", "0", "--num_decoder_blocks", "1", "0", "0", "0"]
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + blocks


def losses(tmp_path) -> np.ndarray:
    with (tmp_path / "run" / "loss.csv").open() as file:
        return np.array([[float(value) for value in row] for row in csv.reader(file)])


def test_training_lowers_the_losses_and_saves_an_autoencoder(script, arguments, tmp_path, caplog):
    script.main([*arguments, "--max_train_steps", "40", "--learning_rate", "1e-2", "--validation_steps", "20"])
    log = losses(tmp_path)
    assert log.shape == (40, 5)
    assert (log[-10:, 1:3].mean(0) < 0.8 * log[:10, 1:3].mean(0)).all()  # latents, L1; LPIPS is random here
    assert log[-1, 4] == 0  # the learning rate ends at zero

    weights = load_file(tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    caplog.clear()
    vae = AutoencoderTiny.from_pretrained(tmp_path / "run" / "vae")
    assert not caplog.records  # no warning
    assert vae.config.scaling_factor == 1.0
    with torch.no_grad():
        reconstruction = vae.decode(vae.encode(torch.zeros(1, 3, 32, 48)).latents).sample
    assert reconstruction.shape == (1, 3, 32, 48)
    assert Image.open(tmp_path / "run" / "grid-000040.png").size == (6 * 128, 4 * 128)


def test_a_stopped_run_goes_on(script, arguments, tmp_path):
    arguments = [*arguments, "--checkpointing_steps", "2"]
    script.main([*arguments, "--max_train_steps", "4"])
    script.main([*arguments, "--max_train_steps", "7", "--resume_from_checkpoint", "latest"])
    assert losses(tmp_path)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    # Two are kept, sorted by number.
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-6", "checkpoint-7"]
    assert not list((tmp_path / "run").glob("partial-*"))


def test_pool_keeps_the_teachers_latents_of_its_crops(script, arguments, photo_dir, tmp_path):
    args = script.parse_args([*arguments, "--pool_reuse", "2", "--hole_probability", "1"])
    teacher = AutoencoderTiny.from_pretrained(tmp_path / "teacher").eval()
    pool = script.CropPool(PictureReader([photo_dir]), teacher, args, np.random.default_rng(0))
    for _ in range(5):
        pixels, latents = pool.batch(2, torch.device("cpu"))
        assert len(pool.pixels) <= args.pool_size
        with torch.no_grad():
            torch.testing.assert_close(teacher.encode(pixels).latents, latents)
        assert (pixels == 0).all(1).flatten(1).any(1).all()  # every crop has its grey hole


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--resolution", "60"], "--resolution"),
        (["--pool_size", "1"], "--pool_size"),
        (["--pool_reuse", "0"], "--pool_reuse"),
    ],
)
def test_wrong_options_are_refused(script, arguments, capsys, option, message):
    with pytest.raises(SystemExit) as error:
        script.main([*arguments, *option])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_photos_are_needed(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--teacher_model_name_or_path", "x", "--output_dir", "y"])
    assert "--train_data_dir" in capsys.readouterr().err


def test_unknown_checkpoint_is_refused(script, arguments):
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        script.main([*arguments, "--resume_from_checkpoint", "nowhere"])
