"""Command-line arguments that the training scripts share, named as in diffusers' examples."""

import argparse

from .masks import MASK_PRESETS


def training_parser(description: str) -> argparse.ArgumentParser:
    """An empty parser whose help shows the defaults."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", help="pipeline folder or hub repository to start from")
    add("--vae", help="autoencoder folder or hub repository; default: the pipeline's own `vae`")
    add("--checkpoint", help="which of its published checkpoints, for example places2")
    add("--revision", help="branch, tag or commit of `--pretrained_model_name_or_path`")
    add("--variant", help="variant of its weights, for example fp16")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", nargs="+", help="folders of photos")
    add(
        "--train_shards_path_or_url",
        nargs="+",
        help="WebDataset tar shards: files, patterns with * or {000..127}, or URLs, which are streamed",
    )
    add("--train_metadata", nargs="+", help="files of JSON lines with `image`, `mask` and `category`")
    add("--dataset_name", help="data set of the hub, or a folder that `datasets` can load")
    add("--dataset_config_name", help="its configuration")
    add("--dataset_split", default="train")
    add("--image_column", default="image")
    add("--stream_shards", action="store_true", help="stream local shards too, instead of indexing them first")
    add("--shuffle_buffer_size", type=int, default=1000, help="samples that each reader of a stream shuffles")
    add("--cache_latents", metavar="DIR", help="encode crops and holes once into this folder, or use what it holds")
    add("--cache_masks_per_picture", type=int, default=3)
    add("--cache_crops_per_picture", type=int, default=1)
    add("--cache_only", action="store_true", help="fill the cache and stop")
    add("--resolution", type=int, default=512, help="side of a crop in pixels")
    add("--mask_presets", nargs="+", choices=sorted(MASK_PRESETS), default=["medium_512", "thick_512"])
    add("--foreground_probability", type=float, default=0.1, help="share of samples that train the foreground tokens")
    add("--dataloader_num_workers", type=int, default=0)


def add_objective_arguments(parser: argparse.ArgumentParser, timestep_sampling: str = "uniform") -> None:
    add = parser.add_argument_group("objective").add_argument
    add(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="what the model predicts; default: as the pipeline's scheduler says, epsilon from scratch",
    )
    add("--rescale_betas_zero_snr", action="store_true", help="the last timestep is pure noise; needs v_prediction")
    add("--hole_loss_weight", type=float, default=1.0, help="weight of a latent cell in the hole; outside it is 1")
    add("--snr_gamma", type=float, help="min-SNR weighting (arXiv 2303.09556); 5 is usual")
    add("--noise_offset", type=float, default=0.0357)
    add(
        "--timestep_sampling",
        choices=("uniform", "logit_normal"),
        default=timestep_sampling,
        help="logit_normal: 1000 sigmoid(normal), as the release distils",
    )
    add("--timestep_bias", type=float, default=1.0, help="timesteps are 1000 u^(1/bias): above 1 favours high noise")
    add("--train_timesteps", type=int, nargs="+", help="only these, those that a few-step sampler visits")
    add("--last_timestep_probability", type=float, default=0.0, help="share of samples that start from pure noise")


def add_optimization_arguments(
    parser: argparse.ArgumentParser,
    learning_rate: float = 1e-4,
    optimizer: str = "adamw",
    weight_decay: float = 1e-2,
    freeze_batch_norm: bool = False,
) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--train_batch_size", type=int, default=16, help="samples in a step of one process")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    add("--allow_tf32", action="store_true", help="TensorFloat-32 products on Ampere and later GPUs")
    add("--torch_compile", action="store_true", help="compile the U-Net; the first step then takes minutes")
    add("--max_train_steps", type=int, default=10_000)
    add("--learning_rate", type=float, default=learning_rate)
    add("--scale_lr", action="store_true", help="multiply the learning rate by processes, accumulation and batch size")
    add("--optimizer", choices=("adamw", "muon"), default=optimizer)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999 if optimizer == "adamw" else 0.95)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--weight_decay", type=float, default=weight_decay)
    add("--lr_scheduler", default="constant_with_warmup", help="a name of diffusers.optimization.SchedulerType")
    add("--lr_warmup_steps", type=int, default=500)
    add("--lr_num_cycles", type=int, default=1, help="hard restarts of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="power of polynomial")
    add("--lr_milestones", type=int, nargs="+", help="steps at which the learning rate is multiplied by `--lr_gamma`")
    add("--lr_gamma", type=float, default=0.1)
    add("--max_grad_norm", type=float, default=1.0)
    if not freeze_batch_norm:
        add("--freeze_batch_norm", action="store_true", help="train with the BatchNorm statistics of inference")
    else:  # accepted, so that the command in a model card can be run
        add("--freeze_batch_norm", action="store_true", default=True, help=argparse.SUPPRESS)
    add("--use_ema", action="store_true", help="average the weights; the average is validated and saved")
    add("--ema_decay", type=float, default=0.9999)


def add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("validation").add_argument
    add("--validation_data", nargs="+", help="folders or tar shards of photos that are not trained on")
    add("--validation_steps", type=int, default=1000, help="steps between two validations")
    add("--num_validation_images", type=int, default=8)
    add("--validation_inference_steps", type=int, default=20)
    add("--validation_guidance_scale", type=float, default=1.0)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", required=True)
    add("--logging_dir", default="logs", help="for the trackers, inside `--output_dir`")
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int, help="the oldest checkpoints beyond this number are deleted")
    add("--resume_from_checkpoint", help="a checkpoint folder, or `latest`")
    add("--logging_steps", type=int, default=20)
    add("--report_to", help="tensorboard, wandb or another tracker of accelerate")
    add("--seed", type=int, default=0)
    add("--push_to_hub", action="store_true", help="upload the result when the run has ended")
    add("--hub_model_id", help="repository to upload to; default: the name of `--output_dir`")
    add("--hub_private", action="store_true", help="create that repository as a private one")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message that names the option if values do not fit together."""
    if args.train_timesteps and not all(0 <= timestep < 1000 for timestep in args.train_timesteps):
        parser.error(f"`--train_timesteps` must be from 0 to 999, but are {args.train_timesteps}")
    if args.rescale_betas_zero_snr and args.prediction_type != "v_prediction":
        parser.error(
            "`--rescale_betas_zero_snr` needs `--prediction_type v_prediction`: pure noise says nothing of noise"
        )
    for name in (
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "checkpointing_steps",
        "validation_steps",
        "logging_steps",
    ):
        if getattr(args, name) < 1:
            parser.error(f"`--{name}` must be at least 1, but is {getattr(args, name)}")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        parser.error(f"`--checkpoints_total_limit` must be at least 1, but is {args.checkpoints_total_limit}")
    if args.timestep_bias <= 0:
        parser.error(f"`--timestep_bias` must be above 0, but is {args.timestep_bias}")
    if args.timestep_sampling != "uniform" and (args.train_timesteps or args.timestep_bias != 1):
        parser.error("`--timestep_sampling` goes with neither `--train_timesteps` nor `--timestep_bias`")
    if args.lr_milestones and sorted(set(args.lr_milestones)) != args.lr_milestones:
        parser.error(f"`--lr_milestones` must rise, but are {args.lr_milestones}")
