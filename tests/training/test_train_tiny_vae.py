import pytest
import torch
from diffusers import AutoencoderTiny
from lpips_weights import make_weights
from PIL import Image
from runs import load_script, read_log
from safetensors.torch import load_file, save_file

from diffusers_moebius.training.loop import list_checkpoints


@pytest.fixture(scope="module")
def script():
    return load_script("train_tiny_vae")


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
        "logging_steps": 1,
        "lr_warmup_steps": 2,
    }
    blocks = ["--num_encoder_blocks", "0", "0", "0", "0", "--num_decoder_blocks", "1", "0", "0", "0"]
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + blocks


def test_training_lowers_the_losses_and_saves_an_autoencoder(script, arguments, photo_dir, tmp_path, caplog):
    out = tmp_path / "run"
    validation = ["--validation_data", str(photo_dir), "--validation_steps", "40", "--num_validation_images", "3"]
    script.main([*arguments, *validation, "--max_train_steps", "40", "--learning_rate", "1e-2"])
    rows = read_log(out)
    assert len(rows) == 40
    for name in ("latent", "l1"):  # LPIPS is random here
        values = [float(row[name]) for row in rows]
        assert sum(values[-10:]) < 0.8 * sum(values[:10])
    assert float(rows[-1]["lr"]) < 1e-4  # ends near zero

    weights = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    caplog.clear()
    vae = AutoencoderTiny.from_pretrained(out / "vae")
    assert not caplog.records  # no warning
    assert vae.config.scaling_factor == 1.0
    with torch.no_grad():
        reconstruction = vae.decode(vae.encode(torch.zeros(1, 3, 32, 48)).latents).sample
    assert reconstruction.shape == (1, 3, 32, 48)
    # input, teacher, student, the teacher's latents decoded, photo
    assert Image.open(out / "validation-40.png").size == (3 * 64, 5 * (64 + 14))


def test_a_stopped_run_goes_on_to_the_same_weights(script, arguments, tmp_path):
    arguments = [*arguments, "--checkpointing_steps", "2"]
    whole, stopped = (["--output_dir", str(tmp_path / name)] for name in ("whole", "stopped"))
    script.main([*arguments, *whole, "--max_train_steps", "7", "--lr_scheduler", "constant"])
    script.main([*arguments, *stopped, "--max_train_steps", "4", "--lr_scheduler", "constant"])
    resume = ["--resume_from_checkpoint", "latest"]
    script.main([*arguments, *stopped, *resume, "--max_train_steps", "7", "--lr_scheduler", "constant"])
    assert [row["step"] for row in read_log(tmp_path / "stopped")] == list("1234567")
    # Two are kept, sorted by number.
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-6", "checkpoint-7"]
    assert not list((tmp_path / "stopped").glob("partial-*"))
    first, second = (
        load_file(tmp_path / name / "vae/diffusion_pytorch_model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--resolution", "60"], "--resolution"),
        (["--min_crop_area", "0"], "--min_crop_area"),
    ],
)
def test_wrong_options_are_refused(script, arguments, capsys, option, message):
    with pytest.raises(SystemExit) as error:
        script.main([*arguments, *option])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_photos_are_needed(script, arguments):
    place = arguments.index("--train_data_dir")
    with pytest.raises(ValueError, match="`train_data_dir`"):
        script.main(arguments[:place] + arguments[place + 2 :])


def test_unknown_checkpoint_is_refused(script, arguments):
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        script.main([*arguments, "--resume_from_checkpoint", "nowhere"])
