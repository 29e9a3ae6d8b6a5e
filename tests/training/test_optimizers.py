import argparse
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from diffusers_moebius.training.optimizers import (
    Muon,
    build_lr_scheduler,
    build_optimizer,
    muon_parameter_groups,
    orthogonalize,
)


def test_three_steps_match_the_release(parity_dir):
    numbers = load_file(parity_dir / "muon.safetensors")
    parameters = {name: torch.nn.Parameter(numbers[f"before.{name}"]) for name in ("matrix", "conv", "bias")}
    groups = [
        {"params": [parameters["matrix"], parameters["conv"]], "use_muon": True},
        {"params": [parameters["bias"]], "use_muon": False},
    ]
    optimizer = Muon(groups, lr=2e-4, weight_decay=0.1)
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = numbers[f"grad.{step}.{name}"]
        optimizer.step()
        for name, parameter in parameters.items():
            expected = numbers[f"after.{step}.{name}"]
            change = (expected - numbers[f"before.{name}"]).abs().max()
            tolerance = 1e-5 if name == "bias" else 1e-3  # AdamW's part; the rest is orthogonalised in bfloat16
            assert (parameter - expected).abs().max() <= tolerance * change, (step, name)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 or later")
def test_matrices_move_as_with_the_muon_of_torch():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 40, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [
        Muon([{"params": [ours], "use_muon": True}], lr=1e-2, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(24, 40, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    # Both iterate in bfloat16, from momenta of another scale.
    assert (ours - theirs).norm() / (theirs - start).norm() < 5e-2


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, steps=10))
    assert values.min() > 0.6 and values.max() < 1.3


def test_groups_hold_every_parameter_once(tiny_unet, tiny_lcg_embedder):
    groups = muon_parameter_groups(torch.nn.ModuleList([tiny_unet, tiny_lcg_embedder]))
    muon, adamw = (group["params"] for group in groups)
    assert groups[0]["use_muon"] and not groups[1]["use_muon"]
    everything = [*tiny_unet.parameters(), *tiny_lcg_embedder.parameters()]
    assert sorted(map(id, muon + adamw)) == sorted(map(id, everything))
    assert all(parameter.ndim >= 2 for parameter in muon)
    in_adamw = {id(parameter) for parameter in adamw}
    for parameter in (
        tiny_unet.conv_in.conv_pw.weight,
        tiny_unet.conv_out.conv_pw.weight,
        tiny_lcg_embedder.embedding_layer.weight,
    ):
        assert id(parameter) in in_adamw


def test_plain_parameters_are_refused():
    with pytest.raises(ValueError, match="`params`"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))])


def test_learning_rate_drops_at_milestones_after_the_warmup():
    args = argparse.Namespace(lr_milestones=[5, 8], lr_gamma=0.1, lr_warmup_steps=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_lr_scheduler(args, optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 2, 2, 2, 2, 0.2, 0.2, 0.2, 0.02, 0.02])


def test_8_bit_adam_is_that_of_bitsandbytes(monkeypatch):
    args = argparse.Namespace(
        learning_rate=0.5,
        scale_lr=True,
        gradient_accumulation_steps=2,
        train_batch_size=3,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        optimizer="adamw",
        use_8bit_adam=True,
    )
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    made = []
    optim = types.SimpleNamespace(AdamW8bit=lambda parameters, **options: made.append((parameters, options)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=optim))
    build_optimizer(args, model, torch.device("cpu"), num_processes=2)
    ((parameters, options),) = made
    assert parameters == [model.weight]
    assert options == {"lr": 6.0, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"`--use_8bit_adam`.*pip install bitsandbytes"):
        build_optimizer(args, model, torch.device("cpu"))
