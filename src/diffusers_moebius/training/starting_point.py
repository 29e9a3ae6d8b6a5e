"""The pipeline that a run starts from: a published or saved one, or a new one with untrained weights."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import nn

from ..loaders.hub import load_vae
from ..loaders.release_checkpoint import make_release_scheduler
from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DModel
from ..models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

UNETS = {cls.__name__: cls for cls in (MoebiusUNet2DModel, PixelHackerUNet2DModel)}


def load_unet_config(path: str | Path) -> nn.Module:
    """A U-Net with untrained weights from a JSON file of its arguments; `_class_name` may ask for the teacher's."""
    config = json.loads(Path(path).read_text())
    name = config.pop("_class_name", "MoebiusUNet2DModel")
    if name not in UNETS:
        raise ValueError(f"`_class_name` in {path} must be one of {', '.join(UNETS)}, but is {name!r}.")
    return UNETS[name](**config)


def build_pipeline(args: argparse.Namespace, teacher: MoebiusInpaintPipeline | None = None) -> MoebiusInpaintPipeline:
    """
    The pipeline to start from.

    A new one has the noise schedule of its teacher or, without one, of the release, and what the options say of it.

    Args:
        args: See `training.arguments`.
        teacher ([`MoebiusInpaintPipeline`], *optional*): Gives a new pipeline its autoencoder, unless `args` name one.
    """
    if args.pretrained_model_name_or_path is not None:
        pipeline = MoebiusInpaintPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            args.checkpoint,
            vae=args.vae,
            revision=args.revision,
            variant=args.variant,
            dtype=torch.float32,
        )
        # A model goes on predicting what it predicts, whatever its teacher does.
        schedule = pipeline.scheduler.config
    else:
        unet = load_unet_config(args.unet_config)
        embedder = LatentCategoriesEmbedder(2 * unet.config.get("context_length", 10), unet.config.encoder_hid_dim)
        schedule = teacher.scheduler.config if teacher is not None else make_release_scheduler().config
        vae = load_vae(args.vae) if args.vae is not None else teacher.vae
        pipeline = MoebiusInpaintPipeline(vae, unet, embedder, DDIMScheduler.from_config(schedule))
    changes = {}
    if args.prediction_type is not None:
        changes["prediction_type"] = args.prediction_type
        changes["rescale_betas_zero_snr"] = args.rescale_betas_zero_snr
        changes["timestep_spacing"] = "trailing" if args.rescale_betas_zero_snr else "leading"
    pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config(schedule, **changes))
    return pipeline


def check_schedules(student: MoebiusInpaintPipeline, teacher: MoebiusInpaintPipeline) -> None:
    """Raises the error of a student whose predictions mean something else than its teacher's."""
    own, other = (
        {**pipeline.scheduler.config, "latent_channels": pipeline.vae.config.latent_channels}
        for pipeline in (student, teacher)
    )
    names = ["prediction_type", "latent_channels"]
    # The noise itself, whatever makes it: betas, their schedule and number, zero terminal SNR.
    betas = [pipeline.scheduler.alphas_cumprod for pipeline in (student, teacher)]
    if betas[0].shape != betas[1].shape or not torch.allclose(*betas, rtol=1e-4, atol=1e-7):
        names += ["num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas"]
        names += ["rescale_betas_zero_snr"]
    differences = [
        f"`{name}` is {other.get(name)!r} of the teacher and {own.get(name)!r} of the student"
        for name in names
        if own.get(name) != other.get(name)
    ]
    if differences:
        raise ValueError(
            f"Teacher and student must agree in predictions, noise and latents, but {'; '.join(differences)}: set"
            " `--prediction_type`, `--rescale_betas_zero_snr` or `--vae`, or leave them out for a new student."
        )


def load_teacher(args: argparse.Namespace, device: torch.device) -> MoebiusInpaintPipeline:
    """The teacher's pipeline, its U-Net and embedder frozen and in the type of `--mixed_precision`."""
    pipeline = MoebiusInpaintPipeline.from_pretrained(
        args.pretrained_teacher_model_name_or_path, args.teacher_checkpoint, dtype=torch.float32
    )
    for model in (pipeline.unet, pipeline.lcg_embedder, pipeline.vae):
        model.to(device).eval().requires_grad_(False)
    if args.mixed_precision != "no":
        for model in (pipeline.unet, pipeline.lcg_embedder):
            model.to(torch.float16 if args.mixed_precision == "fp16" else torch.bfloat16)
    if args.torch_compile:
        pipeline.unet.compile()
    return pipeline
