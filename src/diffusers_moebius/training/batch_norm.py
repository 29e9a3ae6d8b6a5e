"""BatchNorm in training: frozen statistics, and new ones for averaged weights."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import trange


def set_train_mode(model: nn.Module, freeze_batch_norm: bool) -> None:
    """Training mode, with BatchNorm left to its running statistics if it is to be frozen."""
    model.train()
    if freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, forward, num_batches: int) -> None:
    """
    Replaces BatchNorm's running statistics, which belong to the raw weights, by those of the present ones.

    Args:
        model (`torch.nn.Module`): The model; it is left in evaluation mode. One without BatchNorm is not run at all.
        forward (callable): Runs the model on the batch of the number it is called with.
        num_batches (`int`): Batches to average over.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    model.train()
    for number in trange(num_batches if norms else 0, desc="BatchNorm statistics", mininterval=5):
        forward(number)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()
