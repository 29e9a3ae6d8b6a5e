#!/usr/bin/env python3
"""Trains or fine-tunes Moebius on photos with random holes: the plain diffusion objective, without a teacher.

From scratch, on latents that are encoded once:

    accelerate launch training/train_inpainting.py --unet_config unet.json --vae madebyollin/taesdxl \\
        --train_data_dir photos/ --cache_latents runs/cache-128 --resolution 128 --output_dir runs/nano

Fine-tuning a pipeline, with latents encoded in every step:

    accelerate launch training/train_inpainting.py --pretrained_model_name_or_path runs/nano \\
        --train_shards_path_or_url "shards/photos-*.tar" --resolution 256 --output_dir runs/tuned

An interrupted run (Ctrl-C, SIGTERM, a crash) goes on with `--resume_from_checkpoint latest`.
"""

import argparse
import json
import logging
import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from torch import nn
from tqdm.auto import tqdm

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline
from diffusers_moebius.training.data import (
    LatentCacheDataset,
    PictureDataset,
    PictureReader,
    ResumableBatchSampler,
    build_latent_cache,
    encode_latents,
    hole_at_latent_size,
    mask_to_latent_size,
)
from diffusers_moebius.training.masks import MASK_PRESETS
from diffusers_moebius.training.optimizers import Muon, muon_parameter_groups

logger = logging.getLogger("train_inpainting")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    # model
    add("--pretrained_model_name_or_path", help="pipeline folder or hub repository to start from")
    add("--unet_config", help="JSON file with the arguments of MoebiusUNet2DModel, to start from scratch")
    add("--vae", help="autoencoder folder or hub repository; default: the pipeline's own `vae`")
    # data
    add("--train_data_dir", nargs="+", help="folders of photos")
    add("--train_shards_path_or_url", nargs="+", help="WebDataset tar shards, or glob patterns of them")
    add("--cache_latents", metavar="DIR", help="encode crops and holes once into this folder, or use what it holds")
    add("--cache_masks_per_picture", type=int, default=3)
    add("--cache_crops_per_picture", type=int, default=1)
    add("--cache_only", action="store_true", help="fill the cache and stop")
    add("--resolution", type=int, default=512, help="side of a crop in pixels")
    add("--mask_presets", nargs="+", choices=sorted(MASK_PRESETS), default=["medium_512", "thick_512"])
    add("--foreground_probability", type=float, default=0.1, help="share of samples that train the foreground tokens")
    add("--dataloader_num_workers", type=int, default=0)
    # objective
    add("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon")
    add("--rescale_betas_zero_snr", action="store_true", help="the last timestep is pure noise; needs v_prediction")
    add("--hole_loss_weight", type=float, default=1.0, help="weight of a latent cell in the hole; outside it is 1")
    add("--snr_gamma", type=float, help="min-SNR weighting (arXiv 2303.09556); 5 is usual")
    add("--noise_offset", type=float, default=0.0357)
    add("--timestep_bias", type=float, default=1.0, help="timesteps are 1000 u^(1/bias): above 1 favours high noise")
    add("--train_timesteps", type=int, nargs="+", help="only these, those that a few-step sampler visits")
    add("--last_timestep_probability", type=float, default=0.0, help="share of samples that start from pure noise")
    # optimisation
    add("--train_batch_size", type=int, default=16, help="samples in a step of one process")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    add("--max_train_steps", type=int, default=10_000)
    add("--learning_rate", type=float, default=1e-4)
    add("--optimizer", choices=("adamw", "muon"), default="adamw")
    add("--weight_decay", type=float, default=1e-2)
    add("--lr_scheduler", default="constant_with_warmup", help="a name of diffusers.optimization.SchedulerType")
    add("--lr_warmup_steps", type=int, default=500)
    add("--max_grad_norm", type=float, default=1.0)
    add("--freeze_batch_norm", action="store_true", help="train with the BatchNorm statistics that inference uses")
    add("--use_ema", action="store_true")
    add("--ema_decay", type=float, default=0.9999)
    # validation
    add("--validation_data", nargs="+", help="folders or tar shards of photos that are not trained on")
    add("--validation_steps", type=int, default=1000, help="steps between two validations")
    add("--num_validation_images", type=int, default=8)
    add("--validation_inference_steps", type=int, default=20)
    add("--validation_guidance_scale", type=float, default=1.0)
    # run
    add("--output_dir", required=True)
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help="a checkpoint folder, or `latest`")
    add("--logging_steps", type=int, default=20)
    add("--report_to", help="tensorboard, wandb or another tracker of accelerate")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    if (args.pretrained_model_name_or_path is None) == (args.unet_config is None):
        parser.error("give one of `--pretrained_model_name_or_path` and `--unet_config`")
    if args.unet_config is not None and args.vae is None:
        parser.error("`--unet_config` starts from scratch and needs `--vae`")
    if args.train_timesteps and not all(0 <= timestep < 1000 for timestep in args.train_timesteps):
        parser.error(f"`--train_timesteps` must be from 0 to 999, but are {args.train_timesteps}")
    if args.rescale_betas_zero_snr and args.prediction_type == "epsilon":
        parser.error(
            "`--rescale_betas_zero_snr` needs `--prediction_type v_prediction`: pure noise says nothing of noise"
        )
    return args


class ConditionedDenoiser(nn.Module):
    """U-Net and LCG embedder as one module, so that both are wrapped, averaged and saved together."""

    def __init__(self, unet: MoebiusUNet2DModel, lcg_embedder: LatentCategoriesEmbedder):
        super().__init__()
        self.unet, self.lcg_embedder = unet, lcg_embedder

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, category_ids: torch.Tensor) -> torch.Tensor:
        return self.unet(sample, timesteps, self.lcg_embedder(category_ids)).sample


def load_vae(name: str, subfolder: str | None = None) -> nn.Module:
    config = AutoencoderTiny.load_config(name, subfolder=subfolder)
    cls = AutoencoderTiny if config["_class_name"] == "AutoencoderTiny" else AutoencoderKL
    return cls.from_pretrained(name, subfolder=subfolder).eval().requires_grad_(False)


def build_models(args: argparse.Namespace) -> tuple[ConditionedDenoiser, nn.Module, DDIMScheduler]:
    if args.unet_config is not None:
        unet = MoebiusUNet2DModel(**json.loads(Path(args.unet_config).read_text()))
        embedder = LatentCategoriesEmbedder(2 * unet.config.context_length, unet.config.encoder_hid_dim)
    else:
        source = args.pretrained_model_name_or_path
        unet = MoebiusUNet2DModel.from_pretrained(source, subfolder="unet")
        embedder = LatentCategoriesEmbedder.from_pretrained(source, subfolder="lcg_embedder")
    vae = load_vae(args.vae) if args.vae else load_vae(args.pretrained_model_name_or_path, "vae")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1 if args.prediction_type == "epsilon" else 0,
        prediction_type=args.prediction_type,
        rescale_betas_zero_snr=args.rescale_betas_zero_snr,
        timestep_spacing="trailing" if args.rescale_betas_zero_snr else "leading",
    )
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for module in unet.modules():  # a quarter faster on a processor, and what tensor cores like
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return ConditionedDenoiser(unet, embedder), vae, scheduler


def build_dataset(args: argparse.Namespace, vae: nn.Module, accelerator: Accelerator) -> torch.utils.data.Dataset:
    sources = [*(args.train_data_dir or []), *(args.train_shards_path_or_url or [])]
    pictures = None
    if sources:
        pictures = PictureDataset(PictureReader(sources), args.resolution, args.mask_presets, args.seed)
    elif args.cache_latents is None:
        raise ValueError("`train_data_dir`, `train_shards_path_or_url` or a filled `cache_latents` must be given.")
    if args.cache_latents is None:
        return pictures
    if pictures is not None:
        build_latent_cache(
            vae,
            pictures,
            args.cache_latents,
            args.cache_masks_per_picture,
            args.cache_crops_per_picture,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            progress=lambda done, total: logger.info("latent cache: shard %d of %d", done, total),
        )
        if pictures.reader.skipped:
            logger.warning("%d unreadable files skipped: %s", len(pictures.reader.skipped), pictures.reader.skipped)
    accelerator.wait_for_everyone()
    return LatentCacheDataset(args.cache_latents)


def sample_timesteps(args: argparse.Namespace, count: int, last: int, generator: torch.Generator) -> torch.Tensor:
    uniform, pure_noise = torch.rand(2, count, generator=generator)
    if args.train_timesteps:
        timesteps = torch.tensor(args.train_timesteps)[(uniform * len(args.train_timesteps)).long()]
    else:
        timesteps = (uniform ** (1 / args.timestep_bias) * (last + 1)).long().clamp(max=last)
    return timesteps.where(pure_noise >= args.last_timestep_probability, torch.tensor(last))


def compute_loss(
    args: argparse.Namespace,
    model: nn.Module,
    scheduler: DDIMScheduler,
    batch: dict[str, torch.Tensor],
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss, and the mean squared error inside the holes alone."""
    latents, mask, masked_latents = batch["latents"], batch["mask"], batch["masked_latents"]
    count, size = latents.shape[0], latents.shape[-2:]
    noise = torch.randn(latents.shape, generator=generator)
    noise = noise + args.noise_offset * torch.randn(count, latents.shape[1], 1, 1, generator=generator)
    noise = noise.to(latents)
    timesteps = sample_timesteps(args, count, scheduler.config.num_train_timesteps - 1, generator).to(latents.device)

    # Photos come without object masks, so every hole is a background hole. The foreground tokens take the part of the
    # dropped condition in classifier-free guidance: they see the same pictures, in a smaller share.
    embeddings = batch["num_embeddings"]
    foreground = torch.rand(count, 1, generator=generator) < args.foreground_probability
    category_ids = (torch.arange(embeddings // 2) + foreground * (embeddings // 2)).to(latents.device)

    noisy = scheduler.add_noise(latents, noise, timesteps)
    sample = torch.cat([noisy, mask_to_latent_size(mask, size), masked_latents], 1)
    prediction = model(sample, timesteps, category_ids).float()
    is_velocity = args.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    error = (prediction - target).square().mean(1, keepdim=True)  # [B, 1, h, w]

    # A cell that the hole only touches is pasted from the prediction in part, so it counts as hole.
    hole = hole_at_latent_size(mask, size)
    weight = 1 + (args.hole_loss_weight - 1) * hole
    weight = weight / weight.mean()
    if args.snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        divisor = snr + 1 if is_velocity else snr
        weight = weight * (snr.clamp(max=args.snr_gamma) / divisor)[:, None, None, None]
    return (weight * error).mean(), (hole * error.detach()).sum() / hole.sum().clamp(min=1)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints, oldest first: a folder gets its final name only once all of it is written."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def save_pipeline_parts(model: ConditionedDenoiser, scheduler: DDIMScheduler, folder: Path) -> None:
    model.unet.save_pretrained(folder / "unet")
    model.lcg_embedder.save_pretrained(folder / "lcg_embedder")
    scheduler.save_pretrained(folder / "scheduler")


@contextmanager
def averaged_weights(model: ConditionedDenoiser, ema: EMAModel | None) -> Iterator[ConditionedDenoiser]:
    """The model with its averaged weights, if there are any; afterwards it has its own again."""
    if ema is None:
        yield model
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield model
    finally:
        ema.restore(model.parameters())


@torch.no_grad()
def validate(args, model: ConditionedDenoiser, vae: nn.Module, scheduler: DDIMScheduler, path: Path) -> dict:
    """Fills fixed holes in held-out photos, writes a grid (input, result, photo) and returns PSNR inside the holes."""
    dataset = PictureDataset(PictureReader(args.validation_data), args.resolution, args.mask_presets, seed=0)
    pairs = [pair for index in range(len(dataset)) if (pair := dataset.crop(index, 1)) is not None]
    photos = torch.stack([pixels for pixels, _ in pairs[: args.num_validation_images]]) / 2 + 0.5
    masks = torch.cat([mask for _, mask in pairs[: args.num_validation_images]])
    model.eval()
    pipeline = MoebiusInpaintPipeline(vae, model.unet, model.lcg_embedder, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    results = pipeline(
        image=photos,
        mask_image=masks,
        height=args.resolution,
        width=args.resolution,
        strength=1.0,
        num_inference_steps=args.validation_inference_steps,
        guidance_scale=args.validation_guidance_scale,
        generator=[torch.Generator().manual_seed(number) for number in range(len(photos))],
        output_type="pt",
    ).images.cpu()
    squared_error = ((results - photos).square() * masks).sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3)))
    rows = torch.cat([photos * (1 - masks), results, photos])
    make_image_grid(VaeImageProcessor().postprocess(rows, "pil", [False] * len(rows)), 3, len(photos)).save(path)
    return {"validation_hole_psnr": (-10 * squared_error.clamp(min=1e-10).log10()).mean().item()}


def save_checkpoint(args, accelerator: Accelerator, model, ema, scheduler, step: int) -> None:
    output_dir = Path(args.output_dir)
    target, partial = output_dir / f"checkpoint-{step}", output_dir / f"partial-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        with averaged_weights(accelerator.unwrap_model(model), ema) as bare:
            save_pipeline_parts(bare, scheduler, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        # Old ones go only now that the new one is complete.
        if args.checkpoints_total_limit is not None:
            for old in list_checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)
        logger.info("wrote %s", target)
    accelerator.wait_for_everyone()


def set_train_mode(model: nn.Module, freeze_batch_norm: bool) -> None:
    model.train()
    if freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, forward, num_batches: int) -> None:
    """Replaces BatchNorm's running statistics, which belong to the raw weights, by those of the present ones."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    model.train()
    for number in range(num_batches):
        forward(number)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.is_main_process:
        (output_dir / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    if args.report_to:
        accelerator.init_trackers("moebius-inpainting")
    set_seed(args.seed)

    model, vae, scheduler = build_models(args)
    vae.to(accelerator.device)
    dataset = build_dataset(args, vae, accelerator)
    if args.cache_only:
        return
    num_embeddings = model.lcg_embedder.config.num_embeddings
    logger.info("%d samples, %.1f M parameters", len(dataset), sum(p.numel() for p in model.parameters()) / 1e6)

    if args.optimizer == "muon":
        # Orthogonalising in bfloat16 is slower than in float32 where the processor has to emulate it.
        dtype = torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16
        groups = muon_parameter_groups({"unet": model.unet, "lcg_embedder": model.lcg_embedder})
        optimizer = Muon(groups, lr=args.learning_rate, weight_decay=args.weight_decay, ns_dtype=dtype)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    ema = None
    if args.use_ema:
        # The warm-up (1 + n) / (10 + n) lets a short run follow its weights at first.
        ema = EMAModel(accelerator.unwrap_model(model).parameters(), decay=args.ema_decay)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)

    step = 0
    if args.resume_from_checkpoint:
        if args.resume_from_checkpoint == "latest":
            found = list_checkpoints(output_dir)
            folder = found[-1] if found else None
        else:
            folder = Path(args.resume_from_checkpoint)
            if not folder.is_dir():
                raise ValueError(
                    f"`resume_from_checkpoint` must be a folder or `latest`, but {str(folder)!r} is neither."
                )
        if folder is None:
            logger.info("no checkpoint in %s: starting anew", output_dir)
        else:
            accelerator.load_state(str(folder))
            step = int(folder.name.split("-")[1])
            logger.info("resuming from %s", folder)

    def loader_from(first_batch: int) -> torch.utils.data.DataLoader:
        sampler = ResumableBatchSampler(
            len(dataset),
            args.train_batch_size,
            args.seed,
            first_batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=args.dataloader_num_workers)

    def prepare_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        if "latents" not in batch:
            pixels, mask = batch["pixel_values"], batch["mask"]
            with torch.no_grad():
                batch["latents"] = encode_latents(vae, pixels)
                batch["masked_latents"] = encode_latents(vae, pixels * (1 - mask))
        return batch | {"num_embeddings": num_embeddings}

    def generator_for(batch_number: int) -> torch.Generator:
        # Noise depends on the number of the batch alone, so that a resumed run repeats an uninterrupted one exactly.
        seed = args.seed + 1_000_003 * (batch_number * accelerator.num_processes + accelerator.process_index + 1)
        return torch.Generator().manual_seed(seed)

    stop = False

    def request_stop(signal_number, frame):
        nonlocal stop
        stop = True

    previous_handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    accumulation = args.gradient_accumulation_steps
    batches = iter(loader_from(step * accumulation))
    is_main = accelerator.is_main_process
    progress = tqdm(initial=step, total=args.max_train_steps, disable=not is_main, mininterval=10)
    log_file = output_dir / "loss.csv"
    sums = torch.zeros(3)
    set_train_mode(model, args.freeze_batch_norm)
    while step < args.max_train_steps and not stop:
        for micro_step in range(accumulation):
            batch = prepare_batch(next(batches))
            with accelerator.accumulate(model):
                loss, hole_error = compute_loss(
                    args, model, scheduler, batch, generator_for(step * accumulation + micro_step)
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            sums += torch.tensor([loss.item(), hole_error.item(), 1.0])
        lr_scheduler.step()
        step += 1
        progress.update()
        if ema is not None:
            ema.step(accelerator.unwrap_model(model).parameters())
        if not math.isfinite(sums[0]):
            raise RuntimeError(f"The loss is {sums[0].item()} at step {step}: the last checkpoint is still good.")
        if step % args.logging_steps == 0:
            mean_loss, mean_hole = (sums[:2] / sums[2]).tolist()
            rate = lr_scheduler.get_last_lr()[0]
            if is_main:
                with log_file.open("a") as file:
                    file.write(f"{step},{mean_loss:.5f},{mean_hole:.5f},{rate:.3e}\n")
            progress.set_postfix(loss=f"{mean_loss:.4f}", hole=f"{mean_hole:.4f}")
            accelerator.log({"loss": mean_loss, "hole_error": mean_hole, "lr": rate}, step=step)
            sums.zero_()
        if step % args.checkpointing_steps == 0 or stop or step == args.max_train_steps:
            save_checkpoint(args, accelerator, model, ema, scheduler, step)
        if args.validation_data and step % args.validation_steps == 0 and is_main:
            with averaged_weights(accelerator.unwrap_model(model), ema) as bare:
                scores = validate(args, bare, vae, scheduler, output_dir / f"validation-{step}.png")
            set_train_mode(model, args.freeze_batch_norm)
            accelerator.log(scores, step=step)
            logger.info("validation at step %d: %s", step, scores)
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)

    if step < args.max_train_steps:
        logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
    elif accelerator.is_main_process:
        bare = accelerator.unwrap_model(model)
        if ema is not None:
            ema.copy_to(bare.parameters())
        if not args.freeze_batch_norm:
            batches = iter(loader_from(step * accumulation))
            recalibrate_batch_norm(
                bare,
                lambda number: compute_loss(
                    args, bare, scheduler, prepare_batch(next(batches)), generator_for(number)
                ),
                50,
            )
        save_pipeline_parts(bare, scheduler, output_dir)
        logger.info("wrote unet, lcg_embedder and scheduler to %s", output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
