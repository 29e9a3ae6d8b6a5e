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
from functools import partial

import torch
from diffusers import DDIMScheduler

from diffusers_moebius.evaluation.lpips import LPIPS
from diffusers_moebius.loaders.hub import load_vae
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.pipelines.latents import decode_latents
from diffusers_moebius.training.arguments import add_training_arguments, check_arguments, training_parser
from diffusers_moebius.training.data import build_dataset
from diffusers_moebius.training.denoiser import prepare_denoiser
from diffusers_moebius.training.distillation import (
    BALANCES,
    AdaptiveBalance,
    distillation_losses,
    load_elatentlpips,
)
from diffusers_moebius.training.latent_cache import with_latents
from diffusers_moebius.training.loop import TrainingLoop
from diffusers_moebius.training.objective import clean_of, noise_batch
from diffusers_moebius.training.results import save_parts, write_results
from diffusers_moebius.training.starting_point import build_pipeline, check_schedules, load_teacher
from diffusers_moebius.training.validation import Validation


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument_group("distillation").add_argument
    add("--unet_config", help="JSON file with the arguments of the student's U-Net, to start from scratch")
    add("--pretrained_teacher_model_name_or_path", required=True, help="pipeline folder or hub repository")
    add("--teacher_checkpoint", help="which of its published checkpoints, for example pretrained")
    losses = ["coarse", "fine", "task"]
    add("--losses", nargs="+", choices=losses, default=losses, help="features, the teacher's prediction, true noise")
    kinds = ("elatentlpips", "lpips", "none")
    add("--perceptual_loss", choices=kinds, default=kinds[0], help="the paper's; or LPIPS of decoded latents, slower")
    add("--perceptual_encoder", choices=("sd15", "sd21", "sdxl"), default="sdxl", help="latent space of elatentlpips")
    add("--lpips_weights", help="safetensors file with the LPIPS network; default: that of the `lpips` package")
    add("--lpips_vae", help="autoencoder that decodes the latents for lpips; default: the student's")
    add("--balance", choices=BALANCES, default="paper", help="how the losses are weighed against each other")
    add_training_arguments(parser)
    muon = {"optimizer": "muon", "learning_rate": 2e-4, "weight_decay": 0.1, "adam_beta2": 0.95}  # as the release
    parser.set_defaults(timestep_sampling="logit_normal", **muon)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if (args.pretrained_model_name_or_path is None) == (args.unet_config is None):
        parser.error("give one of `--pretrained_model_name_or_path` and `--unet_config`")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    loop = TrainingLoop(args, "moebius-distillation")
    accelerator, device = loop.accelerator, loop.accelerator.device

    # models and data; a package that is missing is known before anything large is loaded
    perceptual_loss = None
    if args.perceptual_loss == "elatentlpips":
        perceptual_loss = load_elatentlpips(args.perceptual_encoder, args.balance == "release", device)
    teacher_pipeline = load_teacher(args, device)
    pipeline = build_pipeline(args, teacher_pipeline)
    check_schedules(pipeline, teacher_pipeline)
    if not isinstance(pipeline.unet, MoebiusUNet2DModel):
        raise ValueError(f"The student must be a MoebiusUNet2DModel, but is a {type(pipeline.unet).__name__}.")
    teacher, teacher_embedder = teacher_pipeline.unet, teacher_pipeline.lcg_embedder
    model = prepare_denoiser(args, pipeline, accelerator)
    dataset = build_dataset(args, accelerator, pipeline.vae)
    noise_schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
    num_embeddings = model.lcg_embedder.config.num_embeddings
    if args.perceptual_loss == "lpips":
        decoder = load_vae(args.lpips_vae).requires_grad_(False).to(device) if args.lpips_vae else pipeline.vae
        lpips = LPIPS.from_pretrained(args.lpips_weights).to(device)

        def perceptual_loss(latents, target):
            return lpips(decode_latents(decoder, latents), decode_latents(decoder, target))

    validation = Validation(args, pipeline.vae) if args.validation_data and loop.is_main else None

    balance = AdaptiveBalance(pipeline.unet, args.balance, loop.reduce)
    if args.torch_compile:
        # The balance goes through the graph more than once, so a compiled backward pass must leave it its tensors.
        torch._functorch.config.donated_buffer = False

    model, optimizer = loop.prepare(model, dataset, partial(save_parts, pipeline))

    def noise(batch, generators):
        batch = with_latents(batch, pipeline.vae, generators)
        return noise_batch(args, noise_schedule, batch, generators, num_embeddings, loop.reduce)

    needs_teacher = "coarse" in args.losses or "fine" in args.losses
    scores, known = {}, {}
    for batch, generators in loop.batches():
        with accelerator.accumulate(model):
            noised = noise(batch, generators)
            output = model(noised.model_input, noised.timesteps, noised.category_ids, output_hidden_states=True)
            teacher_output = None
            if needs_teacher:
                with torch.no_grad(), accelerator.autocast():
                    tokens = teacher_embedder(noised.category_ids).embeds
                    sample = noised.model_input.to(teacher.dtype)
                    teacher_output = teacher(sample, noised.timesteps, tokens, output_hidden_states=True)
            losses = distillation_losses(output, teacher_output, noised.target, args.losses, noised.weight)
            if perceptual_loss is not None:
                clean = clean_of(output.sample, noised.noisy_latents, noised.timesteps, noise_schedule)
                losses["perceptual"] = perceptual_loss(clean, noised.latents).mean()
            loss = balance(losses, output.sample)
            if loop.is_finite(loss):
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(loop.trained_parameters, args.max_grad_norm)
                    if loop.may_step(norm):
                        optimizer.step()
        logged = {"loss": loss, "hole_error": noised.hole_error(output.sample), **losses}
        loop.end_batch(logged | {f"weight_{name}": value for name, value in balance.weights.items()})

        if validation is not None and loop.is_due(args.validation_steps):
            if not known:
                known["teacher"] = validation.fill(teacher_pipeline)
            scores = validation.run(loop, pipeline, noise_schedule, known)

    # result
    if loop.finished:
        write_results(loop, pipeline, scores, noise)
    accelerator.end_training()


if __name__ == "__main__":
    main()
