"""Losses of the distillation from PixelHacker and their adaptive balance (paper, section 3.4, equations 4 and 5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

BALANCES = ("paper", "release")
# Which block outputs the coarse loss compares: the student's last down block, the teacher's first up block.
STUDENT_BLOCK, TEACHER_BLOCK = 2, 5
# The release's fixed factors of the coarse, task, fine and perceptual loss.
RELEASE_FACTORS = {"coarse": 0.01, "task": 0.5, "fine": 0.01, "perceptual": 0.5}


def distillation_losses(
    student_output,
    teacher_output,
    target: torch.Tensor,
    clean_latents: torch.Tensor,
    student_clean_latents: torch.Tensor,
    perceptual_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    names: Sequence[str] = ("coarse", "fine", "task"),
    weight: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    The losses of one distillation step, unweighted.

    Args:
        student_output ([`MoebiusUNet2DOutput`]): The student's, with `hidden_states`.
        teacher_output ([`MoebiusUNet2DOutput`]): The teacher's, with `hidden_states`.
        target (`torch.Tensor` of shape `[B, C, H, W]`): What the student is to predict.
        clean_latents (`torch.Tensor` of shape `[B, C, H, W]`): The true latents.
        student_clean_latents (`torch.Tensor` of shape `[B, C, H, W]`): See [`predicted_clean_latents`].
        perceptual_loss (`Callable`, *optional*): Maps two batches of latents to `[B]`; left out by default.
        names (sequence of `str`, defaults to all): `coarse` compares features of student and teacher, `fine` their
            predictions, `task` the prediction with its target.
        weight (`torch.Tensor` of shape `[B, 1, H, W]`, *optional*): Weight of the squared errors of `task` and `fine`;
            the paper has none.

    Returns:
        `dict[str, torch.Tensor]`: Scalars under `coarse`, `task`, `fine` and `perceptual`, in float32.

    Raises:
        ValueError: If the features that `coarse` compares differ in shape.
    """

    def squared_error(prediction, other):
        error = (prediction.float() - other.float()).square()
        return (error if weight is None else weight * error).mean()

    losses = {}
    if "coarse" in names:
        student, teacher = student_output.hidden_states[STUDENT_BLOCK], teacher_output.hidden_states[TEACHER_BLOCK]
        if student.shape != teacher.shape:
            raise ValueError(
                f"The coarse loss compares features of equal shape, but `student_output` has {list(student.shape)} and"
                f" `teacher_output` {list(teacher.shape)}."
            )
        losses["coarse"] = F.mse_loss(student.float(), teacher.float())
    if "task" in names:
        losses["task"] = squared_error(student_output.sample, target)
    if "fine" in names:
        losses["fine"] = squared_error(student_output.sample, teacher_output.sample)
    if perceptual_loss is not None:
        losses["perceptual"] = perceptual_loss(student_clean_latents, clean_latents).mean()
    return losses


def shortened(loss: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A loss of the same value and gradient, whose graph leads from `output` by one product; its own is freed."""
    (gradient,) = torch.autograd.grad(loss, output)
    product = (gradient * output).sum()
    return loss.detach() + product - product.detach()


@dataclass
class BalancedLoss:
    """
    The result of [`AdaptiveBalance`].

    Args:
        total (`torch.Tensor`): The scalar to call `backward` on.
        weights (`dict[str, torch.Tensor]`): The adaptive weights: `fine` and `perceptual` within the output losses,
            `cross` of the output losses against the coarse one.
        gradient_norms (`dict[str, torch.Tensor]`): What they come from; `coarse@C` is the norm of the coarse loss's
            gradient at θ_C, and so on.
    """

    total: torch.Tensor
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient_norms: dict[str, torch.Tensor] = field(default_factory=dict)


class AdaptiveBalance:
    """
    Weighs the losses by the norms of their gradients at two weights of the student.

    θ_F is `conv_out.conv_pw.weight`, through which all output losses (task, fine, perceptual) pass; θ_C is
    `down_blocks.2.attentions.1.proj_out.weight`, through which coarse and output losses pass. The gradients come from
    the one graph of the step, which is kept for `backward`; the weights are constants in it.

    - `"paper"` (equations 4 and 5): `w_i = |grad L_task|^2 / |grad L_i|^2` at θ_F, `L_out = L_task + sum w_i L_i`,
      `w_C = |grad L_C|^2 / |grad L_out|^2` at θ_C, `L = L_C + w_C L_out`.
    - `"release"`: norms instead of their squares, `1e-6` and `1e-4` added to the denominators, weights at most 1e6 and
      1e4, `w_C` by the task loss alone, and every loss times its factor in `RELEASE_FACTORS`.

    Args:
        unet ([`MoebiusUNet2DModel`]): The student.
        mode (`str`, defaults to `"paper"`): Or `"release"`.
        reduce (`Callable`, *optional*): Averages a gradient over processes, so that all of them weigh alike.

    Raises:
        ValueError: If `mode` is unknown.
    """

    def __init__(self, unet, mode: str = "paper", reduce: Callable[[torch.Tensor], torch.Tensor] | None = None):
        if mode not in BALANCES:
            raise ValueError(f"`mode` must be one of {', '.join(BALANCES)}, but is {mode!r}.")
        self.theta_fine = (unet.conv_out.conv_pw if hasattr(unet.conv_out, "conv_pw") else unet.conv_out).weight
        self.theta_coarse = unet.down_blocks[STUDENT_BLOCK].attentions[-1].proj_out.weight
        self.mode = mode
        self.reduce = reduce or (lambda gradient: gradient)

    def _gradient_norm(self, loss: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        return self.reduce(gradient.detach()).float().norm()

    def __call__(self, losses: dict[str, torch.Tensor], output: torch.Tensor | None = None) -> BalancedLoss:
        """
        Args:
            losses (`dict[str, torch.Tensor]`): Of [`distillation_losses`]; any of them may be missing. Without `task`
                the output losses that there are count equally; with nothing to balance the losses are added.
            output (`torch.Tensor` of shape `[B, C, H, W]`, *optional*): The student's prediction, through which the
                output losses depend on its weights. What lies above it, a network that measures perception for
                example, is then gone through once instead of once for each norm; the gradients are the same.

        Returns:
            [`BalancedLoss`].
        """
        if not losses:
            raise ValueError("`losses` is empty; at least one loss is needed.")
        if output is not None:
            losses = {name: loss if name == "coarse" else shortened(loss, output) for name, loss in losses.items()}
        release = self.mode == "release"
        factors = RELEASE_FACTORS if release else dict.fromkeys(RELEASE_FACTORS, 1.0)
        result = BalancedLoss(total=torch.zeros(()))
        norms = result.gradient_norms

        terms = []
        for name in ("task", "fine", "perceptual"):
            if name not in losses:
                continue
            term = factors[name] * losses[name]
            if "task" in losses and len(losses.keys() & {"fine", "perceptual"}) > 0:
                norms[f"{name}@F"] = self._gradient_norm(losses[name], self.theta_fine)
                if name != "task":
                    result.weights[name] = self._ratio(norms["task@F"], norms[f"{name}@F"], 1e-6, 1e6)
                    term = result.weights[name] * term
            terms.append(term)
        output_loss = sum(terms) if terms else None

        if "coarse" not in losses:
            result.total = output_loss
        elif output_loss is None:
            result.total = factors["coarse"] * losses["coarse"]
        else:
            reference = losses["task"] if release and "task" in losses else output_loss
            norms["coarse@C"] = self._gradient_norm(losses["coarse"], self.theta_coarse)
            norms["output@C"] = self._gradient_norm(reference, self.theta_coarse)
            result.weights["cross"] = self._ratio(norms["coarse@C"], norms["output@C"], 1e-4, 1e4)
            result.total = factors["coarse"] * losses["coarse"] + result.weights["cross"] * output_loss
        return result

    def _ratio(self, over: torch.Tensor, under: torch.Tensor, epsilon: float, largest: float) -> torch.Tensor:
        if self.mode == "release":
            return (over / (under + epsilon)).clamp(0, largest)
        # A loss that has reached zero has no gradient to balance: the smallest float keeps its weight finite.
        return (over / under.clamp(min=torch.finfo(under.dtype).tiny)).clamp(max=largest).square()
