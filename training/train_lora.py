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
from pathlib import Path

from diffusers import DDIMScheduler
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

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
from diffusers_moebius.training.loop import TrainingLoop
from diffusers_moebius.training.objective import noise_batch
from diffusers_moebius.training.results import add_to_card, make_lora_card, push_results, training_section
from diffusers_moebius.training.validation import Validation

logger = logging.getLogger("train_lora")
# Projections of the attention layers, also the 1x1 convolutions around them, and of the feed-forward layers.
TARGET_MODULES = (
    *("to_q", "to_k", "to_v", "proj_in", "proj_out"),  # of both models
    *("inverted_conv.conv", "point_conv.conv"),  # Mix-FFN
    *("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"),  # gated linear attention
    *("to_out.0", "net.0.proj", "net.2"),  # softmax attention and GEGLU
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__.split("\n\n")[0])
    add_model_arguments(parser)
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, default=16, help="of the two matrices beside each layer")
    add("--lora_alpha", type=float, help="their product is scaled by alpha / rank; default: the rank")
    add("--lora_dropout", type=float, default=0.0)
    add(
        "--target_modules",
        nargs="+",
        metavar="NAME",
        help="layers whose names end so; default: all projections of attention and feed-forward layers",
    )
    add_data_arguments(parser)
    add_objective_arguments(parser)
    add_optimization_arguments(parser, freeze_batch_norm=True)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if args.pretrained_model_name_or_path is None:
        parser.error("`--pretrained_model_name_or_path` must name the model to adapt")
    if args.prediction_type is not None:
        parser.error("`--prediction_type` is the model's own here: an adapter is of no use with another one")
    if args.rank < 1:
        parser.error(f"`--rank` must be at least 1, but is {args.rank}")
    if not 0 <= args.lora_dropout < 1:
        parser.error(f"`--lora_dropout` must be from 0 to below 1, but is {args.lora_dropout}")
    return args


def find_target_modules(unet: nn.Module, names: list[str] | None) -> list[str]:
    """The names, of those given or else of the default ones, in which names of layers of the model end."""
    found = {name: [] for name in names or TARGET_MODULES}
    for path, module in unet.named_modules():
        for name in found:
            if f".{path}".endswith(f".{name}"):
                found[name].append((path, module))
    if names is None:
        return [name for name in found if found[name]]
    for name, layers in found.items():
        if not layers:
            raise ValueError(f"`--target_modules` must name layers of {type(unet).__name__}, but {name} is none.")
        for path, module in layers:
            # Neither grouped convolutions nor position filters can have an adapter that can be fused.
            if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) > 1:
                raise ValueError(
                    f"`--target_modules` must name linear layers and ungrouped 2-D convolutions, but {name} is also"
                    f" {path}, a {type(module).__name__}."
                )
    return list(found)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    loop = TrainingLoop(args, "moebius-lora")
    device = loop.accelerator.device

    # model with the adapter, and data
    pipeline = build_pipeline(args)
    pipeline.unet.requires_grad_(False)
    pipeline.lcg_embedder.requires_grad_(False)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=find_target_modules(pipeline.unet, args.target_modules),
        init_lora_weights="gaussian",
    )
    pipeline.unet.add_adapter(config)
    model = prepare_denoiser(args, pipeline)
    pipeline.vae.to(device)
    dataset = build_dataset(args, pipeline.vae, loop.accelerator)
    if args.cache_only:
        return
    noise_schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
    num_embeddings = model.lcg_embedder.config.num_embeddings
    validation = Validation(args, pipeline.vae) if args.validation_data and loop.is_main else None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%s, %.2f M parameters of the adapter", describe_dataset(args, dataset), trained / 1e6)

    # optimiser
    optimizer = build_optimizer(args, {"unet": model.unet}, device, loop.accelerator.num_processes)
    lr_scheduler = build_lr_scheduler(args, optimizer)

    def adapter():
        return {name: weight.contiguous() for name, weight in get_peft_model_state_dict(pipeline.unet).items()}

    def save_adapter(folder):
        metadata = pipeline.unet.peft_config["default"].to_dict()
        pipeline.save_lora_weights(folder, adapter(), unet_lora_adapter_metadata=metadata)

    # Checkpoints hold the adapter alone: the weights it learns, which are not those that `--use_ema` averages.
    def save_state(models, weights, folder):
        weights.clear()
        if loop.is_main:
            save_file(adapter(), Path(folder) / "adapter.safetensors")

    def load_state(models, folder):
        models.clear()
        set_peft_model_state_dict(pipeline.unet, load_file(Path(folder) / "adapter.safetensors"))

    loop.accelerator.register_save_state_pre_hook(save_state)
    loop.accelerator.register_load_state_pre_hook(load_state)
    model = loop.prepare(model, optimizer, lr_scheduler, lambda bare, folder: save_adapter(folder))

    scores, results_before = {}, None
    for batch, generators in loop.batches(dataset):
        with loop.accumulate():
            batch = with_latents(batch, pipeline.vae, generators)
            noised = noise_batch(args, noise_schedule, batch, generators, num_embeddings, loop.reduce)
            prediction = model(noised.model_input, noised.timesteps, noised.category_ids).sample
            loss = noised.loss(prediction)
            loop.optimize(loss, {"loss": loss.detach(), "hole_error": noised.hole_error(prediction)})
        if validation is not None and loop.is_due(args.validation_steps):
            with loop.validation() as bare:
                if results_before is None:
                    pipeline.disable_lora()
                    results_before, psnr = validation.fill(pipeline)
                    pipeline.enable_lora()
                    logger.info("PSNR in the hole without the adapter: %.2f", psnr)
                scores = validation.loss(bare, noise_schedule)
                results, scores["validation_hole_psnr"] = validation.fill(pipeline)
            logger.info("validation at step %d: %s", loop.step, scores)
            grid = validation.grid(results_before, results)
            grid.save(loop.output_dir / f"validation-{loop.step}.png")
            loop.log_images({"input, mask, without and with adapter, photo": grid}, loop.step)
            loop.accelerator.log(scores, step=loop.step)

    # result
    if loop.finished and loop.is_main:
        with loop.averaged_weights():
            save_adapter(loop.output_dir)
        make_lora_card(pipeline, loop).save(loop.output_dir / "README.md")
        add_to_card(loop.output_dir, training_section(loop, describe_dataset(args, dataset), scores))
        logger.info("wrote the adapter to %s", loop.output_dir)
        push_results(loop)
    loop.accelerator.end_training()


if __name__ == "__main__":
    main()
