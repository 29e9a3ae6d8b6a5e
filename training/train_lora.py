#!/usr/bin/env python3
"""Adapts Moebius to a set of photos with LoRA: small matrices beside frozen layers, a few megabytes to share.

    accelerate launch training/train_lora.py --pretrained_model_name_or_path hustvl/Moebius \\
        --train_data_dir photos/ --resolution 512 --rank 16 --max_train_steps 2000 --output_dir runs/style

What comes out is loaded with `pipe.load_lora_weights("runs/style")`. The weights of the model and its BatchNorm
statistics stay as they are. An interrupted run (Ctrl-C, SIGTERM, a crash) goes on with
`--resume_from_checkpoint latest`.
"""

import argparse
import logging
from functools import partial

from diffusers import DDIMScheduler

from diffusers_moebius.training.adapters import add_adapter, add_lora_arguments, checkpoint_adapter_alone
from diffusers_moebius.training.arguments import add_training_arguments, check_arguments, training_parser
from diffusers_moebius.training.data import build_dataset, describe_dataset
from diffusers_moebius.training.denoiser import prepare_denoiser
from diffusers_moebius.training.latent_cache import with_latents
from diffusers_moebius.training.loop import TrainingLoop
from diffusers_moebius.training.objective import noise_batch
from diffusers_moebius.training.results import save_parts, write_results
from diffusers_moebius.training.starting_point import build_pipeline
from diffusers_moebius.training.validation import Validation

logger = logging.getLogger("train_lora")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__.split("\n\n")[0])
    add_lora_arguments(parser, rank=16)
    add_training_arguments(parser)
    parser.set_defaults(freeze_batch_norm=True)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if args.pretrained_model_name_or_path is None:
        parser.error("`--pretrained_model_name_or_path` must name the model to adapt")
    if args.prediction_type is not None:
        parser.error("`--prediction_type` is the model's own here: an adapter is of no use with another one")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    loop = TrainingLoop(args, "moebius-lora")
    accelerator, device = loop.accelerator, loop.accelerator.device

    # model with the adapter, and data
    pipeline = build_pipeline(args)
    pipeline.lcg_embedder.requires_grad_(False)
    add_adapter(args, pipeline.unet)
    model = prepare_denoiser(args, pipeline)
    pipeline.vae.to(device)
    dataset = build_dataset(args, pipeline.vae, accelerator)
    noise_schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
    num_embeddings = model.lcg_embedder.config.num_embeddings
    validation = Validation(args, pipeline.vae) if args.validation_data and loop.is_main else None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%s, %.2f M parameters of the adapter", describe_dataset(args, dataset), trained / 1e6)

    checkpoint_adapter_alone(accelerator, model)
    model, optimizer = loop.prepare(model, partial(save_parts, pipeline))

    scores, known = {}, {}
    for batch, generators in loop.batches(dataset):
        with loop.accumulate():
            batch = with_latents(batch, pipeline.vae, generators)
            noised = noise_batch(args, noise_schedule, batch, generators, num_embeddings, loop.reduce)
            prediction = model(noised.model_input, noised.timesteps, noised.category_ids).sample
            loss = noised.loss(prediction)
            if loop.is_finite(loss):
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(loop.trained_parameters, args.max_grad_norm)
                    if loop.may_step(norm):
                        optimizer.step()
        loop.end_batch({"loss": loss.detach(), "hole_error": noised.hole_error(prediction)})

        if validation is not None and loop.is_due(args.validation_steps):
            if not known:
                pipeline.disable_lora()
                with loop.validation():
                    known["without the adapter"] = validation.fill(pipeline)
                pipeline.enable_lora()
            scores = validation.run(loop, pipeline, noise_schedule, known)

    # result
    if loop.finished:
        write_results(loop, pipeline, dataset, scores)
    accelerator.end_training()


if __name__ == "__main__":
    main()
