#!/usr/bin/env python3
"""Distils a Moebius student from a PixelHacker teacher (arXiv 2606.19195, section 3.4).

The paper's run, on the published teacher:

    accelerate launch training/train_distillation.py --pretrained_teacher_model_name_or_path hustvl/PixelHacker \\
        --unet_config training/recipes/moebius-unet.json --train_shards_path_or_url "shards/photos-*.tar" \\
        --resolution 512 --train_batch_size 48 --mixed_precision bf16 --max_train_steps 138000 \\
        --lr_milestones 111000 129000 --balance paper --use_ema --output_dir runs/student

The loss has four parts: `coarse` compares features of the two, `fine` their predictions, `task` the student's
prediction with its target, and the perceptual loss the clean latents that it implies with the true ones. An
interrupted run (Ctrl-C, SIGTERM, a crash) goes on with `--resume_from_checkpoint latest`.
"""

import argparse
import logging

import torch
from diffusers import DDIMScheduler

from diffusers_moebius.loaders.hub import load_vae
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.pipelines.latents import predicted_clean_latents
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline
from diffusers_moebius.training.arguments import (
    add_data_arguments,
    add_model_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_run_arguments,
    add_validation_arguments,
    check_arguments,
    training_parser,
)
from diffusers_moebius.training.components import (
    build_dataset,
    build_lr_scheduler,
    build_optimizer,
    build_pipeline,
    describe_dataset,
    prepare_denoiser,
    with_latents,
)
from diffusers_moebius.training.distillation import (
    BALANCES,
    AdaptiveBalance,
    distillation_losses,
)
from diffusers_moebius.training.loop import TrainingLoop
from diffusers_moebius.training.objective import noise_batch
from diffusers_moebius.training.perceptual import LPIPS, DecodedLPIPS, ELatentLPIPSLoss
from diffusers_moebius.training.results import write_pipeline
from diffusers_moebius.training.validation import Validation

logger = logging.getLogger("train_distillation")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__.split("\n\n")[0])
    add_model_arguments(parser)
    add = parser.add_argument_group("distillation").add_argument
    add("--unet_config", help="JSON file with the arguments of the student's U-Net, to start from scratch")
    add("--pretrained_teacher_model_name_or_path", required=True, help="pipeline folder or hub repository")
    add("--teacher_checkpoint", help="which of the teacher's published checkpoints, for example pretrained")
    add("--losses", nargs="+", choices=("coarse", "fine", "task"), default=["coarse", "fine", "task"])
    add(
        "--perceptual_loss",
        choices=("elatentlpips", "lpips", "none"),
        default="elatentlpips",
        help="elatentlpips: the paper's, by its own package; lpips: LPIPS of the decoded latents, slower",
    )
    add("--perceptual_encoder", choices=("sd15", "sd21", "sdxl"), default="sdxl", help="latent space of elatentlpips")
    add("--lpips_weights", help="safetensors file with the LPIPS network; default: that of the `lpips` package")
    add("--lpips_vae", help="autoencoder that decodes the latents for lpips; default: the student's")
    add("--balance", choices=BALANCES, default="paper", help="how the losses are weighed against each other")
    add_data_arguments(parser)
    add_objective_arguments(parser, timestep_sampling="logit_normal")
    add_optimization_arguments(parser, learning_rate=2e-4, optimizer="muon", weight_decay=0.1)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if (args.pretrained_model_name_or_path is None) == (args.unet_config is None):
        parser.error("give one of `--pretrained_model_name_or_path` and `--unet_config`")
    return args


def load_teacher(args: argparse.Namespace, accelerator) -> MoebiusInpaintPipeline:
    """The teacher's pipeline, its U-Net and embedder on the device and frozen."""
    pipeline = MoebiusInpaintPipeline.from_pretrained(
        args.pretrained_teacher_model_name_or_path, args.teacher_checkpoint, dtype=torch.float32
    )
    for model in (pipeline.unet, pipeline.lcg_embedder):
        model.to(accelerator.device).eval().requires_grad_(False)
        if args.mixed_precision != "no":
            model.to(torch.float16 if args.mixed_precision == "fp16" else torch.bfloat16)
    if args.torch_compile:
        pipeline.unet.compile()
    return pipeline


def check_schedules(student, teacher) -> None:
    for name in ("prediction_type", "rescale_betas_zero_snr", "beta_start", "beta_end", "beta_schedule"):
        own, other = (pipeline.scheduler.config.get(name) for pipeline in (student, teacher))
        if own != other:
            raise ValueError(
                f"Teacher and student need one noise schedule, but the teacher's `{name}` is {other!r} and the"
                f" student's {own!r}."
            )


def build_perceptual_loss(args: argparse.Namespace, vae, device: torch.device):
    if args.perceptual_loss == "none":
        return None
    if args.perceptual_loss == "elatentlpips":
        return ELatentLPIPSLoss(args.perceptual_encoder).to(device)
    decoder = load_vae(args.lpips_vae).requires_grad_(False) if args.lpips_vae else vae
    return DecodedLPIPS(decoder, LPIPS.from_pretrained(args.lpips_weights)).to(device)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    loop = TrainingLoop(args, "moebius-distillation")
    accelerator, device = loop.accelerator, loop.accelerator.device

    # models and data
    teacher_pipeline = load_teacher(args, accelerator)
    pipeline = build_pipeline(args, teacher_pipeline.vae)
    check_schedules(pipeline, teacher_pipeline)
    if not isinstance(pipeline.unet, MoebiusUNet2DModel):
        raise ValueError(f"The student must be a MoebiusUNet2DModel, but is a {type(pipeline.unet).__name__}.")
    teacher, teacher_embedder = teacher_pipeline.unet, teacher_pipeline.lcg_embedder
    model = prepare_denoiser(args, pipeline)
    pipeline.vae.to(device)
    dataset = build_dataset(args, pipeline.vae, accelerator)
    if args.cache_only:
        return
    noise_schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
    num_embeddings = model.lcg_embedder.config.num_embeddings
    perceptual_loss = build_perceptual_loss(args, pipeline.vae, device)
    validation = Validation(args, pipeline.vae) if args.validation_data and loop.is_main else None
    sizes = [sum(p.numel() for p in unet.parameters()) / 1e6 for unet in (pipeline.unet, teacher)]
    logger.info("%s, student of %.1f M parameters, teacher of %.1f M", describe_dataset(args, dataset), *sizes)

    # optimiser and balance
    modules = {"unet": model.unet, "lcg_embedder": model.lcg_embedder}
    optimizer = build_optimizer(args, modules, device, accelerator.num_processes)
    lr_scheduler = build_lr_scheduler(args, optimizer)
    balance = AdaptiveBalance.of_student(pipeline.unet, args.balance, loop.reduce)
    if args.torch_compile:
        # The balance goes through the graph more than once, so a compiled backward pass must leave it its tensors.
        torch._functorch.config.donated_buffer = False

    def save_parts(bare, folder):
        bare.unet.save_pretrained(folder / "unet")
        bare.lcg_embedder.save_pretrained(folder / "lcg_embedder")
        pipeline.scheduler.save_pretrained(folder / "scheduler")

    model = loop.prepare(model, optimizer, lr_scheduler, save_parts)

    def noise(batch, generators):
        batch = with_latents(batch, pipeline.vae, generators)
        return noise_batch(args, noise_schedule, batch, generators, num_embeddings, loop.reduce)

    needs_teacher = "coarse" in args.losses or "fine" in args.losses
    scores, teacher_results = {}, None
    for batch, generators in loop.batches(dataset):
        with loop.accumulate():
            noised = noise(batch, generators)
            output = model(noised.model_input, noised.timesteps, noised.category_ids, output_hidden_states=True)
            teacher_output = None
            if needs_teacher:
                with torch.no_grad(), accelerator.autocast():
                    tokens = teacher_embedder(noised.category_ids)
                    sample = noised.model_input.to(teacher.dtype)
                    teacher_output = teacher(sample, noised.timesteps, tokens, output_hidden_states=True)
            clean = predicted_clean_latents(
                output.sample.float(),
                noised.noisy_latents,
                noised.timesteps,
                noise_schedule.alphas_cumprod,
                noise_schedule.config.prediction_type,
            )
            losses = distillation_losses(
                output,
                teacher_output,
                noised.target,
                noised.latents,
                clean,
                perceptual_loss,
                *(name in args.losses for name in ("coarse", "fine", "task")),
                weight=noised.weight,
            )
            balanced = balance(losses, output.sample)
            logged = {"loss": balanced.total, "hole_error": noised.hole_error(output.sample), **losses}
            logged |= {f"weight_{name}": value for name, value in balanced.weights.items()}
            loop.optimize(balanced.total, {name: value.detach() for name, value in logged.items()})
        if validation is not None and loop.is_due(args.validation_steps):
            if teacher_results is None:
                teacher_results, psnr = validation.fill(teacher_pipeline)
                logger.info("the teacher's PSNR in the hole: %.2f", psnr)
            with loop.validation() as bare:
                scores = validation.loss(bare, noise_schedule)
                results, scores["validation_hole_psnr"] = validation.fill(pipeline)
            logger.info("validation at step %d: %s", loop.step, scores)
            grid = validation.grid(teacher_results, results)
            grid.save(loop.output_dir / f"validation-{loop.step}.png")
            loop.log_images({"input, mask, teacher, student, photo": grid}, loop.step)
            accelerator.log(scores, step=loop.step)

    # result
    if loop.finished:
        write_pipeline(loop, pipeline, dataset, noise, scores)
    accelerator.end_training()


if __name__ == "__main__":
    main()
