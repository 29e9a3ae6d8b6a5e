import torch

from diffusers_moebius.training.batch_norm import recalibrate_batch_norm, set_train_mode


def test_batch_norm_statistics_belong_to_the_final_weights(capsys):
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(50)
    model = torch.nn.Sequential(norm)
    batches = torch.randn(4, 16, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    recalibrate_batch_norm(model, lambda number: model(batches[number]), 4)
    torch.testing.assert_close(norm.running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, batches.var(1).mean(0))
    assert norm.momentum == 0.1 and not model.training
    assert "BatchNorm statistics: 100%" in capsys.readouterr().err


def test_a_model_without_batch_norm_is_not_run():
    model = torch.nn.Linear(2, 2)
    recalibrate_batch_norm(model, lambda number: 1 / 0, 50)
    assert not model.training


def test_frozen_statistics_do_not_move():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    set_train_mode(model, freeze_batch_norm=True)
    assert model[1].training and not model[0].training
    set_train_mode(model, freeze_batch_norm=False)
    assert model[0].training
