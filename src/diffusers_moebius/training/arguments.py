"""Command-line arguments that the training scripts share, named as in diffusers' examples."""

import argparse

from diffusers.optimization import SchedulerType

from ..pictures.random_mask import MASK_PRESETS


class _Help(argparse.HelpFormatter):
    """Shows the default of every option whose text does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required or action.default is argparse.SUPPRESS or "default" in text:
            return text
        default = action.default
        if default is None or isinstance(default, bool):
            default = {None: "none", False: "no", True: "yes"}[default]
        elif isinstance(default, list | tuple):
            default = " ".join(map(str, default))
        return f"{text} (default: {default})".replace("%", "%%")


def training_parser(description: str) -> argparse.ArgumentParser:
    """An empty parser whose help shows the defaults."""
    return argparse.ArgumentParser(description=description, formatter_class=_Help, allow_abbrev=False)


def add_training_arguments(parser: argparse.ArgumentParser, lora: bool = False) -> None:
    """Adds all of them, with `lora` those of LoRA too; a script sets other defaults by `parser.set_defaults`."""
    _add_model_arguments(parser)
    if lora:
        _add_lora_arguments(parser)
    _add_data_arguments(parser)
    _add_objective_arguments(parser)
    add_optimization_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="pipeline folder or hub repository to start from, or nano")
    add("--vae", help="autoencoder folder or hub repository; default: the pipeline's own `vae`")
    add("--checkpoint", help="which of its published checkpoints, for example ft_places2")
    add("--revision", help="branch, tag or commit of `--pretrained_model_name_or_path`; default: main")
    add("--variant", help="variant of its weights, for example fp16; default: the plain files")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add_picture_arguments(parser)
    add = parser.add_argument_group("latents and holes").add_argument
    add("--cache_latents", metavar="DIR", help="encode once into this folder, or use it; default: in every step")
    add("--cache_masks_per_picture", type=int, default=3, help="holes that the cache has of each crop")
    add("--cache_crops_per_picture", type=int, default=1, help="crops that the cache has of each picture")
    add("--foreground_probability", type=float, default=0.1, help="share of samples that train the foreground tokens")


def _add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, help="of the two matrices beside each layer; default: no LoRA, the whole U-Net is trained")
    add("--lora_alpha", type=float, help="their product is scaled by alpha / rank; default: the rank")
    add("--lora_dropout", type=float, default=0.0, help="share of a layer's input that its adapter does not see")
    add(
        "--target_modules",
        nargs="+",
        metavar="NAME",
        help="layers whose names end so; default: all projections of attention and feed-forward layers",
    )


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures").add_argument
    add("--train_data_dir", nargs="+", help="folders of photos")
    add(
        "--train_shards_path_or_url",
        nargs="+",
        help="WebDataset tar shards: files, patterns with * or {000..127}, or URLs, which are streamed",
    )
    add("--train_metadata", nargs="+", help="files of JSON lines with `image`, `mask` and `category`")
    add("--dataset_name", help="data set of the hub, or a folder that `datasets` can load")
    add("--dataset_config_name", help="its configuration; default: the only one")
    add("--dataset_split", default="train", help="its split")
    add("--image_column", default="image", help="its column with the pictures")
    add("--max_train_samples", type=int, help="only the first so many pictures; default: all")
    add("--stream_shards", action="store_true", help="stream local shards too, instead of indexing them first")
    add("--shuffle_buffer_size", type=int, default=1000, help="samples that each reader of a stream shuffles")
    add("--resolution", type=int, default=512, help="side of a crop in pixels")
    add("--min_crop_area", type=float, default=0.35, help="smallest crop, as a share of the photo's largest square")
    add("--random_flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the crops")
    add(
        "--mask_presets",
        nargs="+",
        choices=sorted(MASK_PRESETS),
        default=["medium_512", "thick_512"],
        help="families of random holes",
    )
    add("--dataloader_num_workers", type=int, default=0, help="processes that read pictures; 0: the training's own")


def _add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("objective").add_argument
    kinds = ("epsilon", "v_prediction")
    add("--prediction_type", choices=kinds, help="default: the pipeline's or the teacher's, else epsilon")
    add("--rescale_betas_zero_snr", action="store_true", help="the last timestep is pure noise; needs v_prediction")
    add("--hole_loss_weight", type=float, default=1.0, help="weight of a latent cell in the hole; outside it is 1")
    add("--snr_gamma", type=float, help="min-SNR weighting (arXiv 2303.09556), 5 is usual; default: none")
    add("--noise_offset", type=float, default=0.0357, help="share of noise that is constant over a channel")
    kinds = ("uniform", "logit_normal")
    add("--timestep_sampling", choices=kinds, default="uniform", help="the release distils with 1000 sigmoid(normal)")
    add("--timestep_bias", type=float, default=1.0, help="timesteps are 1000 u^(1/bias): above 1 favours high noise")
    add("--train_timesteps", type=int, nargs="+", help="only these, those that a sampler visits; default: all")
    add("--last_timestep_probability", type=float, default=0.0, help="share of samples that start from pure noise")


def add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--train_batch_size", type=int, default=16, help="samples in a step of one process")
    add("--gradient_accumulation_steps", type=int, default=1, help="batches whose gradients make one step")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is configured to, else no")
    add("--allow_tf32", action="store_true", help="TensorFloat-32 products on Ampere and later GPUs")
    add("--torch_compile", action="store_true", help="compile the U-Net; the first step then takes minutes")
    add("--max_train_steps", type=int, default=10_000, help="optimiser steps of the run")
    add("--num_train_epochs", type=int, help="passes through the data, instead of `--max_train_steps`; default: those")
    add("--learning_rate", type=float, default=1e-4, help="after the warm-up")
    add("--scale_lr", action="store_true", help="multiply the learning rate by processes, accumulation and batch size")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for matrices, with AdamW for the rest")
    add("--use_8bit_adam", action="store_true", help="AdamW's state in 8 bits, by bitsandbytes")
    add("--adam_beta1", type=float, default=0.9, help="decay of AdamW's mean of gradients")
    add("--adam_beta2", type=float, default=0.999, help="and of their squares")
    add("--adam_epsilon", type=float, default=1e-8, help="added to AdamW's denominator")
    add("--weight_decay", type=float, default=1e-2, help="of every weight, decoupled")
    courses = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
    add("--lr_scheduler", choices=courses, default="constant_with_warmup", help="course of the learning rate")
    add("--lr_warmup_steps", type=int, default=500, help="steps in which the learning rate rises")
    add("--lr_num_cycles", type=int, default=1, help="hard restarts of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="power of polynomial")
    add("--lr_milestones", type=int, nargs="+", help="steps at which it is multiplied by `--lr_gamma`; default: none")
    add("--lr_gamma", type=float, default=0.1, help="factor at each of `--lr_milestones`")
    add("--max_grad_norm", type=float, default=1.0, help="longer gradients are shortened to this")
    add("--freeze_batch_norm", action="store_true", help="train with the BatchNorm statistics of inference")
    add("--use_ema", action="store_true", help="average the weights; the average is validated and saved")
    add("--ema_decay", type=float, default=0.9999, help="share of the average that a step keeps, after a warm-up")


def add_validation_arguments(parser: argparse.ArgumentParser, samples: bool = True) -> None:
    """Adds the options of validation; those of the sampler only where it `samples`."""
    add = parser.add_argument_group("validation").add_argument
    add("--validation_data", nargs="+", help="folders or tar shards of photos not trained on; default: no validation")
    add("--validation_steps", type=int, default=1000, help="steps between two validations")
    add("--num_validation_images", type=int, default=8, help="photos that are filled")
    if not samples:
        return
    add("--validation_inference_steps", type=int, help="steps of the sampler; default: the pipeline's own")
    add("--validation_guidance_scale", type=float, help="guidance; default: the pipeline's own")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", required=True, help="folder for the result, checkpoints and logs")
    add("--logging_dir", default="logs", help="for the trackers, inside `--output_dir`")
    add("--checkpointing_steps", type=int, default=500, help="steps between two checkpoints")
    add("--checkpoints_total_limit", type=int, help="the oldest beyond this number are deleted; default: none is")
    add("--resume_from_checkpoint", help="a folder, its bare name as checkpoint-500, or `latest`; default: start anew")
    add("--logging_steps", type=int, default=20, help="steps whose mean is one line of loss.csv")
    add("--report_to", help="tensorboard, wandb or another tracker of accelerate; default: loss.csv alone")
    add("--seed", type=int, default=0, help="of order, crops, holes and noise")
    add("--push_to_hub", action="store_true", help="upload the result when the run has ended")
    add("--hub_model_id", help="repository to upload to; default: the name of `--output_dir`")
    add("--hub_private", action="store_true", help="create that repository as a private one")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message that names the option if values do not fit together."""
    counts = ["train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "rank"]
    counts += ["checkpointing_steps", "validation_steps", "logging_steps", "checkpoints_total_limit"]
    for name in (*counts, "max_train_samples", "shuffle_buffer_size"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"`--{name}` must be at least 1, but is {value}")
    if not 0 <= getattr(args, "lora_dropout", 0) < 1:
        parser.error(f"`--lora_dropout` must be from 0 to below 1, but is {args.lora_dropout}")
    if not 0 < args.min_crop_area <= 1:
        parser.error(f"`--min_crop_area` must be above 0 and at most 1, but is {args.min_crop_area}")
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"`--resolution` must be a positive multiple of 8, but is {args.resolution}")
    if args.use_8bit_adam and args.optimizer != "adamw":
        parser.error("`--use_8bit_adam` needs `--optimizer adamw`")
    if args.lr_milestones and sorted(set(args.lr_milestones)) != args.lr_milestones:
        parser.error(f"`--lr_milestones` must rise, but are {args.lr_milestones}")
    if not hasattr(args, "timestep_bias"):
        return
    if args.train_timesteps and not all(0 <= timestep < 1000 for timestep in args.train_timesteps):
        parser.error(f"`--train_timesteps` must be from 0 to 999, but are {args.train_timesteps}")
    if args.rescale_betas_zero_snr and args.prediction_type != "v_prediction":
        parser.error("`--rescale_betas_zero_snr` needs `--prediction_type v_prediction`: pure noise tells no noise")
    if args.timestep_bias <= 0:
        parser.error(f"`--timestep_bias` must be above 0, but is {args.timestep_bias}")
    if args.timestep_sampling != "uniform" and (args.train_timesteps or args.timestep_bias != 1):
        parser.error("`--timestep_sampling` goes with neither `--train_timesteps` nor `--timestep_bias`")
