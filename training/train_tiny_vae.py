#!/usr/bin/env python3
"""Trains a small AutoencoderTiny in the latent space of a larger one.

    accelerate launch training/train_tiny_vae.py --teacher_model_name_or_path madebyollin/taesdxl \\
        --train_shards_path_or_url "shards/photos-*.tar" --lpips_weights alex.safetensors --output_dir runs/vae

The encoder learns the teacher's latents; the decoder learns to give the picture back from the teacher's latents and
from those of its own encoder. An interrupted run goes on with `--resume_from_checkpoint latest`.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn

from diffusers_moebius.evaluation.lpips import LPIPS
from diffusers_moebius.training.arguments import (
    add_optimization_arguments,
    add_picture_arguments,
    add_run_arguments,
    add_validation_arguments,
    check_arguments,
    training_parser,
)
from diffusers_moebius.training.data import build_dataset
from diffusers_moebius.training.loop import TrainingLoop
from diffusers_moebius.training.results import push_results
from diffusers_moebius.training.validation import Validation


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument_group("model").add_argument
    add("--teacher_model_name_or_path", required=True, help="AutoencoderTiny folder or hub repository")
    add("--encoder_channels", type=int, default=32, help="width of the encoder")
    add("--decoder_channels", type=int, default=48, help="width of the decoder")
    add("--num_encoder_blocks", type=int, nargs=4, default=[0, 2, 3, 3], help="residual blocks, from full size down")
    add("--num_decoder_blocks", type=int, nargs=4, default=[3, 3, 2, 0], help="residual blocks, up to full size")
    add("--save_dtype", choices=("float16", "float32"), default="float16", help="type of the final weights' file")
    add = parser.add_argument_group("objective").add_argument
    add("--hole_probability", type=float, default=0.25, help="share of crops with a grey hole, as the U-Net gets them")
    add("--latent_weight", type=float, default=1.0, help="weight of the squared error to the teacher's latents")
    add("--l1_weight", type=float, default=1.0, help="weight of the absolute error of the pictures in [-1, 1]")
    add("--lpips_weight", type=float, default=0.5, help="weight of their LPIPS")
    add("--lpips_weights", help="safetensors file with the LPIPS network; default: that of the `lpips` package")
    add_picture_arguments(parser)
    add_optimization_arguments(parser)
    add_validation_arguments(parser, samples=False)
    add_run_arguments(parser)
    # Small crops show native detail, large ones a photo made small: an encoder sees both.
    parser.set_defaults(resolution=128, min_crop_area=0.06, train_batch_size=8, checkpoints_total_limit=2)
    parser.set_defaults(optimizer="muon", learning_rate=1e-3, weight_decay=0.0, adam_beta2=0.95)
    parser.set_defaults(lr_scheduler="cosine", lr_warmup_steps=50)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if args.resolution < 64:
        parser.error(f"`--resolution` must be at least 64, but is {args.resolution}")
    return args


class EncodeAndDecode(nn.Module):
    """One training step's pass through the autoencoder, as one module that accelerate can wrap."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, teacher_latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.vae.encode(pixels).latents
        # Half of the crops are decoded from the teacher's latents, half from the encoder's own. The latter carry no
        # gradient to the encoder: it must stay in the teacher's space, in which the U-Net works.
        own = torch.arange(len(pixels), device=pixels.device)[:, None, None, None] % 2 == 0
        return latents, self.vae.decode(torch.where(own, latents.detach(), teacher_latents)).sample


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    loop = TrainingLoop(args, "tiny-vae")
    accelerator, device = loop.accelerator, loop.accelerator.device

    # models and data
    teacher = AutoencoderTiny.from_pretrained(args.teacher_model_name_or_path).to(device).eval().requires_grad_(False)
    lpips = LPIPS.from_pretrained(args.lpips_weights).to(device)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(args.encoder_channels,) * 4,
        decoder_block_out_channels=(args.decoder_channels,) * 4,
        num_encoder_blocks=tuple(args.num_encoder_blocks),
        num_decoder_blocks=tuple(args.num_decoder_blocks),
        latent_channels=teacher.config.latent_channels,
        scaling_factor=teacher.config.scaling_factor,
        shift_factor=teacher.config.shift_factor,
    )
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if args.torch_compile:
        vae.compile()
    dataset = build_dataset(args, accelerator)
    validation = Validation(args, teacher) if args.validation_data and loop.is_main else None

    model, optimizer = loop.prepare(EncodeAndDecode(vae), dataset, lambda folder: vae.save_pretrained(folder / "vae"))

    for batch, generators in loop.batches():
        with accelerator.accumulate(model):
            drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(device)
            has_hole = (drawn < args.hole_probability)[:, None, None, None]
            pixels = batch["pixel_values"] * (1 - batch["mask"] * has_hole)
            with torch.no_grad():
                teacher_latents = teacher.encode(pixels).latents
            latents, decoded = model(pixels, teacher_latents)
            latent_error, l1 = F.mse_loss(latents, teacher_latents), F.l1_loss(decoded, pixels)
            perceptual = lpips(decoded, pixels).mean()
            loss = args.latent_weight * latent_error + args.l1_weight * l1 + args.lpips_weight * perceptual
            if loop.is_finite(loss):
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(loop.trained_parameters, args.max_grad_norm)
                    if loop.may_step(norm):
                        optimizer.step()
        loop.end_batch({"loss": loss, "latent": latent_error, "l1": l1, "lpips": perceptual})

        if validation is not None and loop.is_due(args.validation_steps):
            with loop.validation(), torch.no_grad():
                pixels = 2 * validation.photos.to(device) - 1
                teacher_latents = teacher.encode(pixels).latents
                pictures = {
                    "teacher": teacher.decode(teacher_latents),
                    "student": vae.decode(vae.encode(pixels).latents),
                    "teacher's latents": vae.decode(teacher_latents),
                }
            rows = {name: (output.sample / 2 + 0.5).clamp(0, 1).cpu() for name, output in pictures.items()}
            scores = {f"{name}: PSNR in the hole": validation.hole_psnr(rows[name]).mean().item() for name in rows}
            validation.write(loop, rows, scores)

    # result
    if loop.finished and loop.is_main:
        with loop.averaged_weights():
            vae.to(getattr(torch, args.save_dtype)).save_pretrained(loop.output_dir / "vae")
        # diffusers writes this one and warns of it on loading.
        config_file = loop.output_dir / "vae" / "config.json"
        config = json.loads(config_file.read_text())
        config.pop("block_out_channels", None)
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        push_results(loop)
    accelerator.end_training()


if __name__ == "__main__":
    main()
