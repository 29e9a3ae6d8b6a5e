import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from diffusers_moebius.pipelines.latents import predicted_clean_latents
from diffusers_moebius.training.distillation import AdaptiveBalance, distillation_losses

SIZES = {
    "sample_size": 16,
    "num_attention_heads": 4,
    "cross_attention_dim": 16,
    "encoder_hid_dim": 24,
    "norm_num_groups": 8,
}


def load(model, path):
    weights = load_file(path)
    prefix = "diff_model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return model, weights["embedding_layer.weight"]


def l1(a, b):
    return (a - b).abs().mean((1, 2, 3))


def balance(student, mode, losses, output=None, **options):
    balance = AdaptiveBalance(student, mode, **options)
    total = balance(losses, output)
    return SimpleNamespace(total=total, weights=balance.weights, gradient_norms=balance.gradient_norms)


@pytest.fixture(scope="module")
def step(parity_dir):
    """The release's recorded training step, up to its losses: student in train mode, teacher in eval mode."""
    student, embedding = load(
        MoebiusUNet2DModel(**SIZES, block_out_channels=(16, 32, 32)).train(), parity_dir / "student_tiny.safetensors"
    )
    # Batch statistics amplify rounding until single ReLUs flip, which moves gradient norms by up to 5e-4: the recorded
    # numbers are to be had with the sums in the release's order.
    student.set_lambda_algorithm("reference")
    teacher, teacher_embedding = load(
        PixelHackerUNet2DModel(**SIZES, block_out_channels=(16, 32, 32, 32)).eval(),
        parity_dir / "teacher_tiny.safetensors",
    )
    embedding.requires_grad_()
    data = load_file(parity_dir / "distillation_step.safetensors")
    recorded = json.loads((parity_dir / "distillation_step.json").read_text())
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    noisy = scheduler.add_noise(data["latents"], data["noise"], data["timestep"])
    sample = torch.cat([noisy, data["mask"], data["masked_image_latents"]], 1)
    output = student(sample, data["timestep"], embedding[data["input_ids"]], output_hidden_states=True)
    with torch.no_grad():
        target_output = teacher(
            sample, data["timestep"], teacher_embedding[data["input_ids"]], output_hidden_states=True
        )
    clean = predicted_clean_latents(output.sample, noisy, data["timestep"], scheduler.alphas_cumprod)
    losses = distillation_losses(output, target_output, data["noise"])
    losses["perceptual"] = l1(clean, data["latents"]).mean()
    return student, embedding, losses, recorded, output.sample, data


def test_training_forward_is_the_release(step):
    _, _, _, _, sample, data = step
    expected = data["student.sample_train"]
    # The same step in float64 is 1.7e-5 away from the recorded one.
    assert ((sample - expected).abs().max() / expected.abs().max()).item() < 3e-5


def test_losses_are_the_release(step):
    _, _, losses, recorded, _, _ = step
    names = {
        "coarse": "loss_featkd",
        "task": "loss_task",
        "fine": "loss_outkd",
        "perceptual": "loss_perceptual_l1_standin",
    }
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(recorded[theirs], rel=1e-4)


def test_release_balance_is_the_release(step):
    student, embedding, losses, recorded, _, _ = step
    balanced = balance(student, "release", losses)
    weights = {name: value.item() for name, value in balanced.weights.items()}
    norms = {name: value.item() for name, value in balanced.gradient_norms.items()}
    assert norms["coarse@C"] == pytest.approx(recorded["feat_gnorm_featkd"], rel=1e-4)
    assert norms["output@C"] == pytest.approx(recorded["feat_gnorm_task"], rel=1e-4)
    assert norms["task@F"] == pytest.approx(recorded["out_gnorm_task"], rel=1e-4)
    assert norms["fine@F"] == pytest.approx(recorded["out_gnorm_outkd"], rel=1e-4)
    assert norms["perceptual@F"] == pytest.approx(recorded["out_gnorm_elatentlpips"], rel=1e-4)
    assert weights["cross"] == pytest.approx(recorded["feat_weight_task"], rel=1e-4)
    assert weights["fine"] == pytest.approx(recorded["out_weight_outkd"], rel=1e-4)
    assert weights["perceptual"] == pytest.approx(recorded["out_weight_elatentlpips"], rel=1e-4)
    assert balanced.total.item() == pytest.approx(recorded["total_release"], rel=1e-4)
    gradients = torch.autograd.grad(balanced.total, [*student.parameters(), embedding], retain_graph=True)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert norm.item() == pytest.approx(recorded["grad_norm_release"], rel=1e-4)


def test_paper_balance_is_equations_4_and_5(step):
    student, _, losses, recorded, _, _ = step
    balanced = balance(student, "paper", losses)
    paper = recorded["paper"]
    assert balanced.weights["fine"].item() == pytest.approx(paper["w_f_kd"], rel=1e-4)
    assert balanced.weights["perceptual"].item() == pytest.approx(paper["w_perceptual"], rel=1e-4)
    assert balanced.weights["cross"].item() == pytest.approx(paper["w_c_task"], rel=1e-4)
    assert balanced.total.item() == pytest.approx(paper["loss_total"], rel=1e-4)


@pytest.mark.parametrize("mode", ["paper", "release"])
def test_going_through_the_output_losses_once_gives_the_same(step, mode):
    student, _, losses, _, sample, data = step
    results = []
    for output in (None, sample):
        # Their own graph above the output, which the second way uses up.
        fresh = {
            "coarse": losses["coarse"],
            "task": (sample - data["noise"]).square().mean(),
            "fine": (sample - data["latents"]).square().mean(),
            "perceptual": (sample * data["latents"]).tanh().abs().mean(),
        }
        balanced = balance(student, mode, fresh, output)
        gradients = torch.autograd.grad(balanced.total, list(student.parameters()), retain_graph=True)
        results.append((balanced, torch.cat([gradient.flatten() for gradient in gradients])))
    (plain, expected), (short, gradients) = results
    assert short.total.item() == pytest.approx(plain.total.item(), rel=1e-5)
    for name, norm in plain.gradient_norms.items():
        assert short.gradient_norms[name].item() == pytest.approx(norm.item(), rel=1e-5)
    assert (gradients - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("mode", ["paper", "release"])
@pytest.mark.parametrize("names", [("task",), ("coarse",), ("coarse", "fine"), ("task", "fine"), ("coarse", "task")])
def test_any_loss_may_be_left_out(step, mode, names):
    student, _, losses, _, _, _ = step
    balanced = balance(student, mode, {name: losses[name] for name in names})
    assert balanced.total.isfinite() and balanced.total > 0
    assert not any(weight.requires_grad for weight in balanced.weights.values())


def test_a_loss_of_zero_leaves_the_others_finite(step):
    student, _, losses, _, sample, _ = step
    balanced = balance(student, "paper", losses | {"fine": (sample - sample.detach()).square().mean()})
    assert balanced.total.isfinite()


def test_gradients_are_reduced_over_processes_before_their_norm(step):
    student, _, losses, _, _, _ = step
    plain = balance(student, "paper", losses)
    doubled = balance(student, "paper", losses, reduce=lambda gradient: 2 * gradient)
    for name, norm in plain.gradient_norms.items():
        if name != "output@C":  # that of a sum whose weights are ratios of the same norms: doubled as well
            assert doubled.gradient_norms[name].item() == pytest.approx(2 * norm.item(), rel=1e-5)
    assert doubled.total.item() == pytest.approx(plain.total.item(), rel=1e-4)


def test_bad_arguments_are_named(step):
    student = step[0]
    with pytest.raises(ValueError, match="`mode`"):
        AdaptiveBalance(student, "mean")
    with pytest.raises(ValueError, match="`losses`"):
        AdaptiveBalance(student)({})
