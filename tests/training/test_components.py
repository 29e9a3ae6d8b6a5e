import argparse

import pytest
import torch

from diffusers_moebius.training.components import build_lr_scheduler, load_unet_config, recalibrate_batch_norm


def test_batch_norm_statistics_belong_to_the_final_weights():
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(50)
    model = torch.nn.Sequential(norm)
    batches = torch.randn(4, 16, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    recalibrate_batch_norm(model, lambda number: model(batches[number]), 4)
    torch.testing.assert_close(norm.running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, batches.var(1).mean(0))
    assert norm.momentum == 0.1 and not model.training


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


def test_unknown_unet_class_is_named(tmp_path):
    (tmp_path / "unet.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=r"_class_name.*PixelHackerUNet2DModel.*UNet2DConditionModel"):
        load_unet_config(tmp_path / "unet.json")
