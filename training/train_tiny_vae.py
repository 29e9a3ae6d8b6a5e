#!/usr/bin/env python3
"""Trains a small AutoencoderTiny in the latent space of a larger one.

    accelerate launch training/train_tiny_vae.py --teacher_model_name_or_path madebyollin/taesdxl \\
        --train_shards "shards/photos-*.tar" --lpips_weights alex.safetensors --output_dir runs/vae

The encoder learns the teacher's latents; the decoder learns to give the picture back from the teacher's latents and
from those of its own encoder. An interrupted run goes on with `--resume_from_checkpoint latest`.
"""

import argparse
import json
import logging
import math
import signal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderTiny
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from diffusers_moebius.training.checkpoints import (
    checkpoint_step,
    complete_checkpoint,
    find_checkpoint,
    partial_checkpoint,
)
from diffusers_moebius.training.masks import MASK_PRESETS, random_mask
from diffusers_moebius.training.optimizers import Muon, muon_parameter_groups
from diffusers_moebius.training.perceptual import LPIPS
from diffusers_moebius.training.picture_datasets import picture_to_tensor, random_resized_crop
from diffusers_moebius.training.picture_sources import PictureReader

logger = logging.getLogger("train_tiny_vae")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    # model
    add("--teacher_model_name_or_path", required=True, help="AutoencoderTiny folder or hub repository")
    add("--encoder_channels", type=int, default=32)
    add("--decoder_channels", type=int, default=48)
    add("--num_encoder_blocks", type=int, nargs=4, default=[0, 2, 3, 3], help="residual blocks, from full size down")
    add("--num_decoder_blocks", type=int, nargs=4, default=[3, 3, 2, 0], help="residual blocks, up to full size")
    # data
    add("--train_data_dir", nargs="+", help="folders of photos")
    add("--train_shards", nargs="+", help="tar shards of photos, or glob patterns of them")
    add("--resolution", type=int, default=128, help="side of a crop in pixels, a multiple of 8")
    add("--hole_probability", type=float, default=0.25, help="share of crops with a grey hole, as the U-Net gets them")
    add("--pool_size", type=int, default=256, help="crops that are kept with the teacher's latents to be used again")
    add("--pool_reuse", type=int, default=4, help="times that a crop is used on average before another replaces it")
    # objective
    add("--latent_weight", type=float, default=1.0, help="weight of the squared error to the teacher's latents")
    add("--l1_weight", type=float, default=1.0, help="weight of the absolute error of the pictures in [-1, 1]")
    add("--lpips_weight", type=float, default=0.5)
    add("--lpips_weights", help="safetensors file with the LPIPS network; default: that of the `lpips` package")
    # optimisation
    add("--train_batch_size", type=int, default=8)
    add("--max_train_steps", type=int, default=10_000)
    add("--learning_rate", type=float, default=1e-3)
    add("--optimizer", choices=("adamw", "muon"), default="muon")
    add("--lr_scheduler", default="cosine", help="a name of diffusers.optimization.SchedulerType")
    add("--lr_warmup_steps", type=int, default=50)
    add("--max_grad_norm", type=float, default=1.0)
    # run
    add("--output_dir", required=True)
    add("--save_dtype", choices=("float16", "float32"), default="float16", help="type of the final weights' file")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, default=2)
    add("--resume_from_checkpoint", help="a checkpoint folder, or `latest`")
    add("--validation_files", nargs="+", help="photos, folders or shards for the grids; default: training photos")
    add("--validation_steps", type=int, default=500, help="steps between two PNG grids: photo, teacher, own")
    add("--logging_steps", type=int, default=20)
    add("--report_to", help="tensorboard, wandb or another tracker of accelerate")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    if not args.train_data_dir and not args.train_shards:
        parser.error("give `--train_data_dir` or `--train_shards`")
    if args.resolution < 64 or args.resolution % 8:
        parser.error(f"`--resolution` must be a multiple of 8 and at least 64, but is {args.resolution}")
    if args.pool_reuse < 1 or args.pool_size < args.train_batch_size:
        parser.error("`--pool_reuse` must be at least 1 and `--pool_size` at least `--train_batch_size`")
    return args


class CropPool:
    """
    Crops with the teacher's latents, each used several times: the teacher costs more than a step of the student.

    Args:
        reader ([`PictureReader`]): Photos.
        teacher (`AutoencoderTiny`): Gives the latents.
        args (`argparse.Namespace`): `resolution`, `hole_probability`, `pool_size` and `pool_reuse` are read.
        generator (`np.random.Generator`): Source of randomness.
    """

    def __init__(self, reader, teacher, args: argparse.Namespace, generator: np.random.Generator):
        self.reader, self.teacher, self.args, self.generator = reader, teacher, args, generator
        self.pixels, self.latents = [], []
        self.order = []

    def crop(self) -> torch.Tensor:
        size, image = self.args.resolution, None
        while image is None:
            if not self.order:
                self.order = self.generator.permutation(len(self.reader)).tolist()
            image = self.reader.read(self.order.pop())
        # Sides from that of the crop (native detail) to that of the photo (strongly downsized), evenly in the
        # logarithm: an encoder sees both.
        largest = min(image.size) / size
        side = min(size * max(largest, 1.0) ** self.generator.random(), min(image.size))
        area = (side / min(image.size)) ** 2
        pixels = picture_to_tensor(random_resized_crop(image, size, self.generator, (area, area)))
        if self.generator.random() < self.args.hole_probability:
            hole = random_mask(size, size, str(self.generator.choice(sorted(MASK_PRESETS))), self.generator)
            pixels = pixels * (1 - torch.from_numpy(hole).float())
        return pixels

    def batch(self, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `count` crops `[B, 3, H, W]` and the teacher's latents of them `[B, C, H / 8, W / 8]`."""
        fresh = count if len(self.pixels) < self.args.pool_size else math.ceil(count / self.args.pool_reuse)
        pixels = torch.stack([self.crop() for _ in range(fresh)])
        with torch.no_grad():
            latents = self.teacher.encode(pixels.to(device)).latents.cpu()
        if len(self.pixels) >= self.args.pool_size:
            for index in sorted(self.generator.choice(len(self.pixels), fresh, replace=False), reverse=True):
                del self.pixels[index], self.latents[index]
        self.pixels += pixels.unbind()
        self.latents += latents.unbind()
        chosen = self.generator.choice(len(self.pixels), count, replace=False)
        gather = lambda values: torch.stack([values[i] for i in chosen]).to(device)  # noqa: E731
        return gather(self.pixels), gather(self.latents)


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


@torch.no_grad()
def write_grid(vae: AutoencoderTiny, teacher: AutoencoderTiny, pixels: torch.Tensor, path: Path) -> None:
    """Writes photo, teacher's reconstruction, own reconstruction and own decoding of the teacher's latents in rows."""
    teacher_latents = teacher.encode(pixels).latents
    rows = [
        pixels,
        teacher.decode(teacher_latents).sample,
        vae.decode(vae.encode(pixels).latents).sample,
        vae.decode(teacher_latents).sample,
    ]
    grid = torch.cat([torch.cat(tuple(row), dim=-1) for row in rows], dim=-2)  # [3, rows * H, columns * W]
    array = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    if accelerator.is_main_process:
        (output_dir / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    if args.report_to:
        accelerator.init_trackers("tiny-vae")
    set_seed(args.seed)
    device = accelerator.device

    # models
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
    logger.info("%.2f M parameters", sum(p.numel() for p in vae.parameters()) / 1e6)

    # data
    reader = PictureReader([*(args.train_data_dir or []), *(args.train_shards or [])])
    logger.info("%d photos", len(reader))
    validation_reader = PictureReader(args.validation_files) if args.validation_files else reader
    generator = np.random.default_rng((args.seed, len(validation_reader)))
    shown = [validation_reader.read(int(i)) for i in generator.permutation(len(validation_reader))[:6]]
    size = 2 * args.resolution
    validation_pixels = torch.stack(
        [picture_to_tensor(random_resized_crop(image, size, generator)) for image in shown if image is not None]
    ).to(device)

    # optimiser
    if args.optimizer == "muon":
        groups = muon_parameter_groups({"vae": vae}, exclude=())
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        optimizer = Muon(groups, lr=args.learning_rate, weight_decay=0.0, ns_dtype=dtype)
    else:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0.0)
    # accelerate moves the scheduler on by one for every process.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model = EncodeAndDecode(vae)
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)

    # resume
    step = 0
    if args.resume_from_checkpoint:
        folder = find_checkpoint(output_dir, args.resume_from_checkpoint)
        if folder is None:
            logger.info("no checkpoint in %s: starting anew", output_dir)
        else:
            accelerator.load_state(str(folder))
            step = checkpoint_step(folder)
            logger.info("resuming from %s", folder)

    # Batches depend on seed and step; a resumed run fills its pool anew, with crops that it has not seen.
    generator = np.random.default_rng((args.seed, step, accelerator.process_index))
    pool = CropPool(reader, teacher, args, generator)
    stop = False

    def request_stop(signal_number, frame):
        nonlocal stop
        stop = True

    previous_handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    progress = tqdm(
        initial=step, total=args.max_train_steps, disable=not accelerator.is_local_main_process, mininterval=10
    )
    log_file = output_dir / "loss.csv"
    sums, count = torch.zeros(3), 0
    model.train()
    while step < args.max_train_steps and not stop:
        pixels, teacher_latents = pool.batch(args.train_batch_size, device)
        latents, decoded = model(pixels, teacher_latents)
        latent_error = F.mse_loss(latents, teacher_latents)
        l1, perceptual = F.l1_loss(decoded, pixels), lpips(decoded, pixels).mean()
        loss = args.latent_weight * latent_error + args.l1_weight * l1 + args.lpips_weight * perceptual
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"The loss is {loss.item()} at step {step}: the last checkpoint is still good.")

        sums += torch.tensor([latent_error.item(), l1.item(), perceptual.item()])
        count += 1
        if step % args.logging_steps == 0 and accelerator.is_main_process:
            means, rate = (sums / count).tolist(), lr_scheduler.get_last_lr()[0]
            with log_file.open("a") as file:
                file.write(f"{step},{means[0]:.5f},{means[1]:.5f},{means[2]:.5f},{rate:.3e}\n")
            progress.set_postfix(latent=f"{means[0]:.4f}", l1=f"{means[1]:.4f}", lpips=f"{means[2]:.4f}")
            accelerator.log({"latent": means[0], "l1": means[1], "lpips": means[2], "lr": rate}, step=step)
            sums.zero_()
            count = 0
        last = stop or step == args.max_train_steps
        if accelerator.is_main_process and (step % args.validation_steps == 0 or last):
            write_grid(vae, teacher, validation_pixels, output_dir / f"grid-{step:06d}.png")
        if step % args.checkpointing_steps == 0 or last:
            if accelerator.is_main_process:
                partial_checkpoint(output_dir, step)
            accelerator.wait_for_everyone()
            partial = output_dir / f"partial-{step}"
            accelerator.save_state(str(partial))
            if accelerator.is_main_process:
                vae.save_pretrained(partial / "vae")
                complete_checkpoint(partial, args.checkpoints_total_limit)
            accelerator.wait_for_everyone()
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)

    if step < args.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    elif accelerator.is_main_process:
        vae.to(getattr(torch, args.save_dtype)).save_pretrained(output_dir / "vae")
        # diffusers writes this one and warns of it on loading.
        config_file = output_dir / "vae" / "config.json"
        config = json.loads(config_file.read_text())
        config.pop("block_out_channels", None)
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        logger.info("wrote %s", output_dir / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    main()
