"""What the training scripts build from their arguments: models, noise schedule, data, optimiser."""

import argparse
import json
import logging
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from torch import nn

from ..loaders.hub import load_vae
from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DModel
from ..models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from ..pipelines.latents import predicted_clean_latents
from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline
from .data import open_training_data
from .latents import LatentCacheDataset, build_latent_cache, encode_latents
from .optimizers import Muon, muon_parameter_groups

logger = logging.getLogger(__name__)
UNETS = {cls.__name__: cls for cls in (MoebiusUNet2DModel, PixelHackerUNet2DModel)}


class ConditionedDenoiser(nn.Module):
    """
    U-Net and LCG embedder as one module, so that both are wrapped, averaged and saved together.

    Args:
        unet ([`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`]): The denoiser.
        lcg_embedder ([`LatentCategoriesEmbedder`]): Embeds the categories.
    """

    def __init__(self, unet: nn.Module, lcg_embedder: LatentCategoriesEmbedder):
        super().__init__()
        self.unet, self.lcg_embedder = unet, lcg_embedder

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, category_ids: torch.Tensor, **kwargs):
        """Returns the U-Net's output for category ids `[B, tokens]`; `kwargs` are its own."""
        return self.unet(sample, timesteps, self.lcg_embedder(category_ids), **kwargs)


class DecodingDenoiser(ConditionedDenoiser):
    """
    A [`ConditionedDenoiser`] that decodes what it predicts, so that a loss can compare pictures.

    Args:
        denoiser ([`ConditionedDenoiser`]): U-Net and embedder.
        vae (`AutoencoderKL` or `AutoencoderTiny`): Its decoder.
        noise_schedule (`DDIMScheduler`): The noise schedule.
    """

    def __init__(self, denoiser: ConditionedDenoiser, vae: nn.Module, noise_schedule: DDIMScheduler):
        super().__init__(denoiser.unet, denoiser.lcg_embedder)
        self.vae, self.noise_schedule = vae, noise_schedule

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, category_ids: torch.Tensor, **kwargs):
        """Returns the U-Net's output with `pictures` `[B, 3, H, W]`, the decoded clean latents that it implies."""
        output = super().forward(sample, timesteps, category_ids, **kwargs)
        prediction = output.sample.float()
        clean = predicted_clean_latents(
            prediction,
            sample[:, : prediction.shape[1]],
            timesteps,
            self.noise_schedule.alphas_cumprod,
            self.noise_schedule.config.prediction_type,
        )
        output["pictures"] = self.vae.decode(clean / self.vae.config.scaling_factor).sample
        return output


def load_unet_config(path: str | Path) -> nn.Module:
    """A U-Net with random weights from a JSON file; `_class_name` in it may be `PixelHackerUNet2DModel`."""
    config = json.loads(Path(path).read_text())
    name = config.get("_class_name", "MoebiusUNet2DModel")
    if name not in UNETS:
        raise ValueError(f"`_class_name` in {path} must be one of {', '.join(UNETS)}, but is {name!r}.")
    return UNETS[name].from_config(config)


def load_pipeline(args: argparse.Namespace) -> MoebiusInpaintPipeline:
    """The pipeline `pretrained_model_name_or_path` in float32, of either layout, with the autoencoder `vae`."""
    names = ("checkpoint", "revision", "variant", "vae")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    return MoebiusInpaintPipeline.from_pretrained(args.pretrained_model_name_or_path, **options, dtype=torch.float32)


def build_pipeline(args: argparse.Namespace, vae: nn.Module | None = None) -> MoebiusInpaintPipeline:
    """
    The pipeline to train: that of `pretrained_model_name_or_path`, or one with a U-Net made from `unet_config`.

    The noise schedule of a new one is that of the release; `prediction_type` and `rescale_betas_zero_snr` change it.

    Args:
        args: See `add_model_arguments` and `add_objective_arguments`.
        vae (`AutoencoderKL` or `AutoencoderTiny`, *optional*): Autoencoder of a new one if `args` name none.
    """
    if args.pretrained_model_name_or_path is not None:
        pipeline = load_pipeline(args)
        if args.prediction_type is None:
            return pipeline
        schedule = dict(pipeline.scheduler.config)
    else:
        unet = load_unet_config(args.unet_config)
        context_length = unet.config.get("context_length", 10)
        embedder = LatentCategoriesEmbedder(2 * context_length, unet.config.encoder_hid_dim)
        vae = load_vae(args.vae) if args.vae is not None else vae
        pipeline = MoebiusInpaintPipeline(vae, unet, embedder, DDIMScheduler())
        schedule = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
        }
    prediction_type = args.prediction_type or "epsilon"
    schedule |= {
        "prediction_type": prediction_type,
        "steps_offset": 1 if prediction_type == "epsilon" else 0,
        "rescale_betas_zero_snr": args.rescale_betas_zero_snr,
        "timestep_spacing": "trailing" if args.rescale_betas_zero_snr else "leading",
    }
    pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config(schedule))
    return pipeline


def prepare_denoiser(args: argparse.Namespace, pipeline: MoebiusInpaintPipeline) -> ConditionedDenoiser:
    """The pipeline's U-Net and embedder as one module, with the memory savers and layouts that were asked for."""
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    for module in pipeline.unet.modules():  # a quarter faster on a processor, and what tensor cores like
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    if args.torch_compile:
        pipeline.unet.compile()  # in place: the names of the weights stay
    pipeline.vae.eval().requires_grad_(False)
    return ConditionedDenoiser(pipeline.unet, pipeline.lcg_embedder)


def build_dataset(args: argparse.Namespace, vae: nn.Module, accelerator):
    """The training data that the arguments name; fills the latent cache first if one is asked for."""
    sources = (args.train_data_dir, args.train_shards_path_or_url, args.train_metadata, args.dataset_name)
    if args.cache_latents is not None and not any(sources):
        return LatentCacheDataset(args.cache_latents)
    pictures = open_training_data(
        args.resolution,
        args.mask_presets,
        args.seed,
        *sources,
        args.dataset_config_name,
        args.dataset_split,
        args.image_column,
        args.stream_shards,
        args.shuffle_buffer_size,
    )
    if args.cache_latents is None:
        return pictures
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
    accelerator.wait_for_everyone()
    return LatentCacheDataset(args.cache_latents)


def describe_dataset(args: argparse.Namespace, dataset) -> str:
    """What a run was trained on, for its log and its model card: the number of samples and where they are from."""
    names = [*(args.train_data_dir or []), *(args.train_shards_path_or_url or []), *(args.train_metadata or [])]
    names = [Path(name).name for name in names] + ([args.dataset_name] if args.dataset_name else [])
    size = f"{len(dataset):,} samples" if hasattr(dataset, "__len__") else "a stream of samples"
    return f"{size} from {', '.join(names)}" if names else size


@torch.no_grad()
def with_latents(
    batch: dict[str, torch.Tensor], vae: nn.Module, generators: list[torch.Generator]
) -> dict[str, torch.Tensor]:
    """A batch with `latents` and `masked_latents`, encoded from its `pixel_values` if it comes without."""
    if "latents" in batch:
        return batch
    pixels = batch["pixel_values"]
    latents = encode_latents(vae, pixels, generators)
    return batch | {
        "latents": latents,
        "masked_latents": encode_latents(vae, pixels * (1 - batch["mask"]), generators),
    }


def build_optimizer(
    args: argparse.Namespace, modules: dict[str, nn.Module], device: torch.device, num_processes: int = 1
) -> torch.optim.Optimizer:
    """The optimiser of the trainable parameters of models by name."""
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= num_processes * args.gradient_accumulation_steps * args.train_batch_size
    options = {
        "lr": learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "muon":
        # Orthogonalising in bfloat16 is slower than in float32 where the processor has to emulate it.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return Muon(muon_parameter_groups(modules), ns_dtype=dtype, **options)
    parameters = [weight for module in modules.values() for weight in module.parameters() if weight.requires_grad]
    return torch.optim.AdamW(parameters, **options)


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    """A schedule of diffusers, or a warm-up with drops at `lr_milestones` (the paper's: 0.1 at 111K and 129K)."""
    if args.lr_milestones:

        def factor(step: int) -> float:
            warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
            return warmup * args.lr_gamma ** sum(step >= milestone for milestone in args.lr_milestones)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def set_train_mode(model: nn.Module, freeze_batch_norm: bool) -> None:
    """Training mode, with BatchNorm left to its running statistics if it is to be frozen."""
    model.train()
    if freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, forward, num_batches: int) -> None:
    """
    Replaces BatchNorm's running statistics, which belong to the raw weights, by those of the present ones.

    Args:
        model (`torch.nn.Module`): The model; it is left in evaluation mode.
        forward (callable): Runs the model on the batch of the number it is called with.
        num_batches (`int`): Batches to average over.
    """
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
