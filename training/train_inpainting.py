#!/usr/bin/env python3
"""Trains or fine-tunes Moebius on photos with random holes: the plain diffusion objective, without a teacher.

From scratch, on latents that are encoded once:

    accelerate launch training/train_inpainting.py --unet_config unet.json --vae madebyollin/taesdxl \\
        --train_data_dir photos/ --cache_latents runs/cache-128 --resolution 128 --output_dir runs/nano

Fine-tuning a pipeline, with latents encoded in every step; with `--rank 16` by LoRA, small matrices beside frozen
layers, a few megabytes to share that `pipe.load_lora_weights("runs/tuned")` loads:

    accelerate launch training/train_inpainting.py --pretrained_model_name_or_path hustvl/Moebius \\
        --train_shards_path_or_url "shards/photos-*.tar" --resolution 512 --output_dir runs/tuned

A model that is to run in one step comes out blurred, since squared errors ask for the mean of what is plausible.
`--lpips_weight` and `--l1_weight` also compare the pictures that its predictions decode to with the photos.

An interrupted run (Ctrl-C, SIGTERM, a crash) goes on with `--resume_from_checkpoint latest`.
"""

import argparse
from functools import partial

import torch.nn.functional as F
from diffusers import DDIMScheduler

from diffusers_moebius.evaluation.lpips import LPIPS
from diffusers_moebius.training.arguments import add_training_arguments, check_arguments, training_parser
from diffusers_moebius.training.data import build_dataset
from diffusers_moebius.training.denoiser import prepare_denoiser
from diffusers_moebius.training.latent_cache import with_latents
from diffusers_moebius.training.loop import TrainingLoop
from diffusers_moebius.training.objective import noise_batch
from diffusers_moebius.training.results import save_parts, write_results
from diffusers_moebius.training.starting_point import build_pipeline
from diffusers_moebius.training.validation import Validation


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__.split("\n\n")[0])
    parser.add_argument("--unet_config", help="JSON file with the arguments of the U-Net, to start from scratch")
    add = parser.add_argument_group("pictures, of the decoded prediction; not with --cache_latents").add_argument
    add("--lpips_weight", type=float, default=0.0, help="weight of its LPIPS to the photo")
    add("--lpips_weights", help="safetensors file with the LPIPS network; default: that of the `lpips` package")
    add("--l1_weight", type=float, default=0.0, help="weight of its absolute error, in [-1, 1]")
    add("--train_decoder", action="store_true", help="train the decoder of the autoencoder too, by these two")
    add_training_arguments(parser, lora=True)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if (args.pretrained_model_name_or_path is None) == (args.unet_config is None):
        parser.error("give one of `--pretrained_model_name_or_path` and `--unet_config`")
    if args.unet_config is not None and args.vae is None:
        parser.error("`--unet_config` starts from scratch and needs `--vae`")
    if args.train_decoder and not (args.lpips_weight or args.l1_weight):
        parser.error("`--train_decoder` needs `--lpips_weight` or `--l1_weight`")
    if (args.lpips_weight or args.l1_weight) and args.cache_latents is not None:
        parser.error("`--lpips_weight` and `--l1_weight` compare with photos, which `--cache_latents` does not keep")
    if args.rank is not None:
        if args.unet_config or args.prediction_type or args.train_decoder:
            parser.error("`--rank` goes with none of `--unet_config`, `--prediction_type` and `--train_decoder`")
        args.freeze_batch_norm = True
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    loop = TrainingLoop(args, "moebius-inpainting")
    accelerator, device = loop.accelerator, loop.accelerator.device

    # model and data
    pipeline = build_pipeline(args)
    if args.rank is not None:
        pipeline.lcg_embedder.requires_grad_(False)
    compares_pictures = bool(args.lpips_weight or args.l1_weight)
    model = prepare_denoiser(args, pipeline, accelerator, decodes=compares_pictures)
    pipeline.vae.decoder.requires_grad_(args.train_decoder)
    dataset = build_dataset(args, accelerator, pipeline.vae)
    noise_schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
    lpips = LPIPS.from_pretrained(args.lpips_weights).to(device) if args.lpips_weight else None
    num_embeddings = model.lcg_embedder.config.num_embeddings
    validation = Validation(args, pipeline.vae) if args.validation_data and loop.is_main else None

    model, optimizer = loop.prepare(model, dataset, partial(save_parts, pipeline))

    def noise(batch, generators):
        batch = with_latents(batch, pipeline.vae, generators)
        return noise_batch(args, noise_schedule, batch, generators, num_embeddings, loop.reduce)

    scores, known = {}, {}
    for batch, generators in loop.batches():
        with accelerator.accumulate(model):
            noised = noise(batch, generators)
            output = model(noised.model_input, noised.timesteps, noised.category_ids)
            loss = noised.loss(output.sample)
            logged = {"loss": loss.detach(), "hole_error": noised.hole_error(output.sample)}
            if compares_pictures:
                pictures, photos = output.pictures, batch["pixel_values"]
                weight = F.interpolate(noised.weight, photos.shape[2:], mode="nearest")
                logged["l1"] = (weight * (pictures - photos).abs()).mean()
                loss = loss + args.l1_weight * logged["l1"]
                if lpips is not None:
                    logged["lpips"] = lpips(pictures, photos, weight).mean()
                    loss = loss + args.lpips_weight * logged["lpips"]
            if loop.is_finite(loss):
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(loop.trained_parameters, args.max_grad_norm)
                    if loop.may_step(norm):
                        optimizer.step()
        loop.end_batch(logged)

        if validation is not None and loop.is_due(args.validation_steps):
            if args.rank is not None and not known:
                pipeline.disable_lora()
                with loop.validation():
                    known["without the adapter"] = validation.fill(pipeline)
                pipeline.enable_lora()
            scores = validation.run(loop, pipeline, noise_schedule, known)

    # result
    if loop.finished:
        write_results(loop, pipeline, scores, noise)
    accelerator.end_training()


if __name__ == "__main__":
    main()
