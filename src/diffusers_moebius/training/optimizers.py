"""Optimisers, learning rates, and Muon with an AdamW part for the parameters that are not matrices."""

import argparse
from collections import defaultdict
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.adamw import adamw

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


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


class Muon(torch.optim.Optimizer):
    """
    Muon for matrices and kernels, AdamW for everything else, in one optimiser with one state dict.

    `torch.optim.Muon` takes 2-D parameters only and orthogonalises them one by one in bfloat16, which processors
    without it emulate at a hundredth of the speed; here a kernel is flattened to `(out, rest)`, equal shapes go
    together and the type is a choice. The two kinds of parameters are two groups that differ in `use_muon`.

    Args:
        params: Parameter groups, each with a bool `use_muon`; see [`muon_parameter_groups`].
        lr (`float`, defaults to 2e-4): Learning rate of both kinds.
        weight_decay (`float`, defaults to 0.1): Decoupled weight decay.
        momentum (`float`, defaults to 0.95): Nesterov momentum of the Muon part.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.95)`): Of the AdamW part.
        eps (`float`, defaults to 1e-8): Of the AdamW part.
        ns_steps (`int`, defaults to 5): Newton–Schulz iterations.
        ns_dtype (`torch.dtype`, defaults to `torch.bfloat16`): Type in which the matrices are orthogonalised.

    Formula: the update of a matrix is `0.2 sqrt(max(rows, columns))` times the orthogonalised momentum (Moonlight,
    arXiv 2502.16982, section 2.2), where rows and columns are the first two dimensions of the parameter.
    """

    def __init__(
        self,
        params,
        lr: float = 2e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)
        self.ns_dtype = ns_dtype
        for group in self.param_groups:
            if "use_muon" not in group:
                raise ValueError("`params` must be groups with `use_muon` set; `muon_parameter_groups` makes them.")

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["use_muon"]:
                self._muon_step(group, parameters)
            else:
                self._adamw_step(group, parameters)
        return loss

    def _muon_step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        # Equal shapes are orthogonalised together: one batched product instead of many small ones.
        by_shape = defaultdict(list)
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
            update = parameter.grad.add(buffer, alpha=group["momentum"])
            by_shape[parameter.shape].append((parameter, update.flatten(1)))
        for shape, members in by_shape.items():
            stacked = torch.stack([update for _, update in members]).to(self.ns_dtype)
            updates = orthogonalize(stacked, group["ns_steps"])
            scale = 0.2 * max(shape[:2]) ** 0.5
            for (parameter, _), update in zip(members, updates):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(shape).to(parameter.dtype), alpha=-group["lr"] * scale)

    def _adamw_step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def muon_parameter_groups(modules: dict[str, nn.Module], exclude: tuple[str, ...] = ("conv_in", "conv_out")) -> list:
    """
    Sorts the trainable parameters of models into a Muon and an AdamW group.

    Args:
        modules (`dict[str, nn.Module]`): Models by name.
        exclude (`tuple[str, ...]`, defaults to `("conv_in", "conv_out")`): Children of a model whose matrices go to
            AdamW. Embedding tables always do.

    Returns:
        `list` of two parameter groups for [`Muon`].
    """
    muon, adamw = [], []
    for model in modules.values():
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.ndim >= 2 and id(parameter) not in tables and name.split(".")[0] not in exclude
            (muon if is_matrix else adamw).append(parameter)
    return [
        group
        for group in ({"params": muon, "use_muon": True}, {"params": adamw, "use_muon": False})
        if group["params"]
    ]


def build_optimizer(
    args: argparse.Namespace, modules: dict[str, nn.Module], device: torch.device, num_processes: int = 1
) -> torch.optim.Optimizer:
    """The optimiser of the trainable parameters of models by name."""
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
        return Muon(muon_parameter_groups(modules), ns_dtype=dtype, **options)
    parameters = [weight for module in modules.values() for weight in module.parameters() if weight.requires_grad]
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
