"""Optimisers, learning rates, and Muon with an AdamW part for the parameters that are not matrices."""

import argparse
from collections import defaultdict
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch import nn

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95  # Nesterov's, of the Muon part


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """
    Brings the singular values of matrices near 1 by a quintic Newton–Schulz iteration.

    Args:
        matrices (`torch.Tensor` of shape `[B, rows, columns]`): The matrices.
        steps (`int`, defaults to 5): Number of iterations.

    Returns:
        `torch.Tensor` of the same shape.

    Formula: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.AdamW):
    """
    Muon for matrices and kernels, AdamW for everything else, in one optimiser with one state dict.

    `torch.optim.Muon` takes 2-D parameters only and orthogonalises them one by one in bfloat16, which processors
    without it emulate at a hundredth of the speed; here a kernel is flattened to `(out, rest)`, equal shapes go
    together and the type is a choice. The two kinds of parameters are two groups that differ in `use_muon`.

    Args:
        params: Parameter groups, each with a bool `use_muon`; see [`muon_parameter_groups`].
        lr (`float`, defaults to 2e-4): Learning rate of both kinds.
        weight_decay (`float`, defaults to 0.1): Decoupled weight decay.
        ns_dtype (`torch.dtype`, defaults to `torch.bfloat16`): Type in which the matrices are orthogonalised.
        kwargs: `betas` and `eps` of the AdamW part.

    Formula: the update of a matrix is `0.2 sqrt(max(rows, columns))` times the orthogonalised momentum (Moonlight,
    arXiv 2502.16982, section 2.2), where rows and columns are the first two dimensions of the parameter.
    """

    def __init__(
        self,
        params,
        lr: float = 2e-4,
        weight_decay: float = 0.1,
        ns_dtype: torch.dtype = torch.bfloat16,
        **kwargs,
    ):
        super().__init__(params, lr=lr, weight_decay=weight_decay, **({"betas": (0.9, 0.95)} | kwargs))
        self.ns_dtype = ns_dtype
        for group in self.param_groups:
            if "use_muon" not in group:
                raise ValueError("`params` must be groups with `use_muon` set; `muon_parameter_groups` makes them.")

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["use_muon"]]
        loss = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["use_muon"]:
                self._muon_step(group, [parameter for parameter in group["params"] if parameter.grad is not None])
        return loss

    def _muon_step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        # Equal shapes are orthogonalised together: one batched product instead of many small ones.
        by_shape = defaultdict(list)
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())  # not counted: AdamW wants one in every state that it loads
            buffer = state["momentum_buffer"].mul_(MOMENTUM).add_(parameter.grad)
            update = parameter.grad.add(buffer, alpha=MOMENTUM)
            by_shape[parameter.shape].append((parameter, update.flatten(1)))
        for shape, members in by_shape.items():
            stacked = torch.stack([update for _, update in members]).to(self.ns_dtype)
            updates = orthogonalize(stacked)
            scale = 0.2 * max(shape[:2]) ** 0.5
            for (parameter, _), update in zip(members, updates):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(shape).to(parameter.dtype), alpha=-group["lr"] * scale)


def muon_parameter_groups(model: nn.Module) -> list:
    """
    Sorts the trainable parameters of a model into a Muon and an AdamW group.

    Args:
        model (`torch.nn.Module`): Its matrices go to Muon, but for those of `conv_in` and `conv_out` and the tables
            of embeddings.

    Returns:
        `list` of two parameter groups for [`Muon`].
    """
    groups = {True: [], False: []}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            at_the_end = not {"conv_in", "conv_out"}.isdisjoint(name.split("."))
            groups[parameter.ndim >= 2 and id(parameter) not in tables and not at_the_end].append(parameter)
    return [{"params": params, "use_muon": use_muon} for use_muon, params in groups.items() if params]


def build_optimizer(
    args: argparse.Namespace, model: nn.Module, device: torch.device, num_processes: int = 1
) -> torch.optim.Optimizer:
    """The optimiser of a model's trainable parameters."""
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= num_processes * args.gradient_accumulation_steps * args.train_batch_size
    options = {
        "lr": learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "muon":
        # Orthogonalising in bfloat16 is slower than in float32 where the processor has to emulate it.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return Muon(muon_parameter_groups(model), ns_dtype=dtype, **options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("`--use_8bit_adam` needs bitsandbytes: `pip install bitsandbytes`.") from error
        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    """A schedule of diffusers, or a warm-up with drops at `lr_milestones` (the paper's: 0.1 at 111K and 129K)."""
    if args.lr_milestones:

        def factor(step: int) -> float:
            warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
            return warmup * args.lr_gamma ** sum(step >= milestone for milestone in args.lr_milestones)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
