"""Losses of the distillation from PixelHacker and their adaptive balance (paper, section 3.4, equations 4 and 5)."""

from collections.abc import Callable, Sequence

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
    names: Sequence[str] = ("coarse", "fine", "task"),
    weight: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    The losses of one distillation step, unweighted, without the perceptual one.

    Args:
        student_output ([`MoebiusUNet2DOutput`]): The student's, with `hidden_states`.
        teacher_output ([`MoebiusUNet2DOutput`]): The teacher's, with `hidden_states`.
        target (`torch.Tensor` of shape `[B, C, H, W]`): What the student is to predict.
        names (sequence of `str`, defaults to all): `coarse` compares features of student and teacher, `fine` their
            predictions, `task` the prediction with its target.
        weight (`torch.Tensor` of shape `[B, 1, H, W]`, *optional*): Weight of the squared errors of `task` and `fine`;
            the paper has none.

    Returns:
        `dict[str, torch.Tensor]`: Scalars by name, in float32.

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
    return losses


def load_elatentlpips(
    encoder: str, add_l1_loss: bool, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    E-LatentLPIPS of its own package: LPIPS on latents, over random shifts and flips of them (arXiv 2405.05967).

    The package `elatentlpips` (extra `perceptual`; its licence forbids commercial use) downloads its weights into the
    folder `ckpt` of the working directory.

    Args:
        encoder (`str`): The autoencoder of the latents: `"sd15"`, `"sd21"` or `"sdxl"`.
        add_l1_loss (`bool`): Add the mean absolute error of the latents, as the package does by default. The released
            training leaves it at that; the paper's loss is the distance of features alone.
        device (`torch.device`): Where it is to compute.

    Returns:
        A function of two batches of scaled latents `[B, C, h, w]` to `[B]`.

    Raises:
        ImportError: If the package is missing.
        OSError: If its weights cannot be downloaded.
    """
    try:
        from elatentlpips import ELatentLPIPS

        metric = ELatentLPIPS(encoder=encoder, augment="bg", verbose=False).requires_grad_(False).to(device)
    except (ImportError, OSError) as error:
        kind = ImportError if isinstance(error, ImportError) else OSError
        raise kind(
            "`--perceptual_loss elatentlpips` needs its package (`pip install diffusers-moebius[perceptual]`, whose"
            f" licence forbids commercial use) and its weights, downloaded or in the folder `ckpt`, but: {error}. Or"
            " take `--perceptual_loss lpips`, or leave it out with `--perceptual_loss none`."
        ) from error
    # `normalize` would scale the latents, which they are already.
    options = {"normalize": False, "ensembling": True, "add_l1_loss": add_l1_loss}
    return lambda latents, target: metric(latents, target, **options).flatten()


def shortened(loss: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A loss of the same value and gradient, whose graph leads from `output` by one product; its own is freed."""
    (gradient,) = torch.autograd.grad(loss, output)
    product = (gradient * output).sum()
    return loss.detach() + product - product.detach()


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

    Attributes:
        weights (`dict[str, torch.Tensor]`): Those of the last call: `fine` and `perceptual` within the output losses,
            `cross` of the output losses against the coarse one.
        gradient_norms (`dict[str, torch.Tensor]`): What they come from; `coarse@C` is the norm of the coarse loss's
            gradient at θ_C, and so on.

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

    def __call__(self, losses: dict[str, torch.Tensor], output: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            losses (`dict[str, torch.Tensor]`): Of [`distillation_losses`]; any of them may be missing. Without `task`
                the output losses that there are count equally; with nothing to balance the losses are added.
            output (`torch.Tensor` of shape `[B, C, H, W]`, *optional*): The student's prediction, through which the
                output losses depend on its weights. What lies above it, a network that measures perception for
                example, is then gone through once instead of once for each norm; the gradients are the same.

        Returns:
            `torch.Tensor`: The scalar to call `backward` on.
        """
        if not losses:
            raise ValueError("`losses` is empty; at least one loss is needed.")
        if output is not None:
            losses = {name: loss if name == "coarse" else shortened(loss, output) for name, loss in losses.items()}
        release = self.mode == "release"
        factors = RELEASE_FACTORS if release else dict.fromkeys(RELEASE_FACTORS, 1.0)
        self.weights = weights = {}
        self.gradient_norms = norms = {}

        terms = {name: factors[name] * losses[name] for name in ("task", "fine", "perceptual") if name in losses}
        if "task" in terms and len(terms) > 1:
            for name in terms:
                norms[f"{name}@F"] = self._gradient_norm(losses[name], self.theta_fine)
                if name != "task":
                    weights[name] = self._ratio(norms["task@F"], norms[f"{name}@F"], 1e-6, 1e6)
                    terms[name] = weights[name] * terms[name]
        output_loss = sum(terms.values())
        if "coarse" not in losses:
            return output_loss
        coarse = factors["coarse"] * losses["coarse"]
        if not terms:
            return coarse
        reference = losses["task"] if release and "task" in losses else output_loss
        norms["coarse@C"] = self._gradient_norm(losses["coarse"], self.theta_coarse)
        norms["output@C"] = self._gradient_norm(reference, self.theta_coarse)
        weights["cross"] = self._ratio(norms["coarse@C"], norms["output@C"], 1e-4, 1e4)
        return coarse + weights["cross"] * output_loss

    def _ratio(self, over: torch.Tensor, under: torch.Tensor, epsilon: float, largest: float) -> torch.Tensor:
        if self.mode == "release":
            return (over / (under + epsilon)).clamp(0, largest)
        # A loss that has reached zero has no gradient to balance: the smallest float keeps its weight finite.
        return (over / under.clamp(min=torch.finfo(under.dtype).tiny)).clamp(max=largest).square()
