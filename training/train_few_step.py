#!/usr/bin/env python3
"""Distils Moebius or PixelHacker with its guidance into a few unguided steps: the whole U-Net, or a LoRA to share.

    accelerate launch training/train_few_step.py --pretrained_teacher_model_name_or_path hustvl/Moebius \\
        --train_shards_path_or_url "shards/photos-*.tar" --resolution 512 --mixed_precision bf16 \\
        --method consistency --rank 16 --learning_rate 1e-4 --output_dir runs/few-step

`consistency` is latent consistency distillation (arXiv 2310.04378) in as many phases as the result takes steps (arXiv
2405.18407): from a point of the teacher's guided path and from the point one solver step earlier the student is to
arrive at the same end of the phase. `adversarial` adds a discriminator on the teacher's features of re-noised latents
(arXiv 2403.12015), which sees the hole and its surroundings.

What comes out runs by itself in `--num_inference_steps` steps without guidance: `pipe(image, mask)`. An interrupted
run (Ctrl-C, SIGTERM, a crash) goes on with `--resume_from_checkpoint latest`.
"""

import argparse
from functools import partial

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from diffusers_moebius.evaluation.lpips import LPIPS
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline
from diffusers_moebius.training.arguments import add_training_arguments, check_arguments, training_parser
from diffusers_moebius.training.data import build_dataset
from diffusers_moebius.training.denoiser import prepare_denoiser
from diffusers_moebius.training.distillation import shortened
from diffusers_moebius.training.few_step import (
    LatentDiscriminator,
    consistency_loss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    guided_prediction,
    phase_ends,
    solver_step,
)
from diffusers_moebius.training.latent_cache import with_latents
from diffusers_moebius.training.loop import TrainingLoop
from diffusers_moebius.training.objective import clean_of, noise_batch
from diffusers_moebius.training.results import save_parts, write_results
from diffusers_moebius.training.starting_point import build_pipeline, check_schedules, load_teacher
from diffusers_moebius.training.validation import Validation

VALIDATED_STEPS = (1, 2, 4)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument_group("few steps").add_argument
    add("--pretrained_teacher_model_name_or_path", required=True, help="pipeline folder or hub repository, or nano")
    add("--teacher_checkpoint", help="which of its published checkpoints, for example ft_places2")
    add("--method", choices=("consistency", "adversarial"), default="consistency", help="how the student is taught")
    add(
        "--teacher_guidance_scale",
        type=float,
        nargs="+",
        metavar="SCALE",
        help="guidance that the student takes over, one or the ends of a range to draw from; default: the teacher's",
    )
    add("--num_solver_steps", type=int, default=20, help="steps of the teacher; skips 1000 / this number timesteps")
    add("--loss_type", choices=("huber", "l2"), default="huber", help="distance of the consistency loss")
    add("--huber_c", type=float, default=0.001, help="where huber turns from squared to absolute")
    add("--adversarial_weight", type=float, default=0.1, help="weight of the discriminator in the student's loss")
    add("--r1_weight", type=float, default=1e-3, help="weight of the discriminator's gradient penalty")
    add("--discriminator_learning_rate", type=float, default=1e-3, help="of AdamW, constant")
    add("--num_inference_steps", type=int, default=4, help="steps that it is trained for: phases of the path")
    add("--teacher_inference_steps", type=int, default=20, help="steps of the teacher in validation")
    add("--lpips_weights", help="safetensors file of an LPIPS network, for validation; default: PSNR alone")
    add_training_arguments(parser, lora=True)
    parser.set_defaults(learning_rate=1e-5, weight_decay=0.0, freeze_batch_norm=True, hole_loss_weight=10.0)
    # The guidance of the teacher's two kinds of tokens is baked into the background tokens.
    parser.set_defaults(foreground_probability=0.0)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    if args.prediction_type is not None:
        parser.error("`--prediction_type` is the teacher's own here")
    if args.validation_inference_steps is not None or args.validation_guidance_scale is not None:
        parser.error("`--validation_inference_steps` and `--validation_guidance_scale` are given: 1, 2 and 4, without")
    if args.num_solver_steps < 1 or 1000 % args.num_solver_steps:
        parser.error(f"`--num_solver_steps` must divide 1000, but is {args.num_solver_steps}")
    if args.num_inference_steps < 1 or args.num_solver_steps % args.num_inference_steps:
        parser.error(f"`--num_inference_steps` must divide `--num_solver_steps`, but is {args.num_inference_steps}")
    if args.teacher_guidance_scale and len(args.teacher_guidance_scale) > 2:
        parser.error("`--teacher_guidance_scale` must be one number or two")
    if not args.train_timesteps:
        interval = 1000 // args.num_solver_steps
        args.train_timesteps = list(range(interval - 1, 1000, interval))
    if args.pretrained_model_name_or_path is None:  # the student begins as its teacher
        args.pretrained_model_name_or_path = args.pretrained_teacher_model_name_or_path
        args.checkpoint = args.checkpoint or args.teacher_checkpoint
    return args


def validate(validation: Validation, teacher: MoebiusInpaintPipeline, pipeline, args, lpips, known: dict) -> tuple:
    """Rows of pictures and scores: the student at 1, 2 and 4 steps, the teacher at many and, with UniPC, at as few."""
    if not known:
        options = {"num_inference_steps": args.teacher_inference_steps, "guidance_scale": None}
        known["teacher"] = validation.fill(teacher, **options)
        for steps in VALIDATED_STEPS:
            plain = MoebiusInpaintPipeline.from_pipe(teacher, default_num_inference_steps=1000).use_few_steps(steps)
            known[f"teacher, UniPC {steps}"] = validation.fill(plain, num_inference_steps=None, guidance_scale=None)
    rows = dict(known)
    for steps in VALIDATED_STEPS:
        rows[f"student, {steps}"] = validation.fill(pipeline, num_inference_steps=steps, guidance_scale=1.0)
    targets, metrics = {"teacher": known["teacher"], "photo": validation.photos}, {"PSNR": validation.hole_psnr}
    if lpips is not None:
        metrics["LPIPS"] = partial(validation.hole_lpips, lpips)
    scores = {
        f"{name}: {kind} to {other}": metric(pictures, target).mean().item()
        for name, pictures in rows.items()
        for other, target in targets.items()
        for kind, metric in metrics.items()
        if name != other
    }
    return rows, scores


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    loop = TrainingLoop(args, "moebius-few-step")
    accelerator, device = loop.accelerator, loop.accelerator.device

    # models and data
    teacher_pipeline = load_teacher(args, device)
    pipeline = build_pipeline(args, teacher_pipeline)
    check_schedules(pipeline, teacher_pipeline)
    teacher = teacher_pipeline.unet
    pipeline.lcg_embedder.requires_grad_(False)
    # The sampler goes along the teacher's path, in even steps from pure noise; one that noises anew would leave it.
    schedule = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    pipeline.register_modules(scheduler=schedule)
    pipeline.register_to_config(
        default_num_inference_steps=args.num_inference_steps,
        default_guidance_scale=1.0,
        default_strength=1.0,
        default_guidance_start=0.0,
    )
    model = prepare_denoiser(args, pipeline, accelerator)
    dataset = build_dataset(args, accelerator, pipeline.vae)
    interval, alphas = schedule.config.num_train_timesteps // args.num_solver_steps, schedule.alphas_cumprod
    validation = Validation(args, pipeline.vae) if args.validation_data and loop.is_main else None
    lpips = LPIPS.from_pretrained(args.lpips_weights).to(device) if args.lpips_weights else None
    scales = args.teacher_guidance_scale or [teacher_pipeline.config.default_guidance_scale]
    embedder, channels = teacher_pipeline.lcg_embedder, pipeline.vae.config.latent_channels
    foreground, background = (
        embedder(embedder.category_ids(category, 1, device)).embeds for category in ("foreground", "background")
    )

    def teacher_features(latents, timesteps, model_input):
        """The teacher's features of latents `[B, 4, h, w]` in the place of those in its input."""
        sample = torch.cat([latents, model_input[:, latents.shape[1] :]], 1).to(teacher.dtype)
        tokens = background.expand(len(latents), -1, -1)
        return teacher(sample, timesteps, tokens, output_hidden_states=True).hidden_states

    discriminator = None
    if args.method == "adversarial":
        side = args.resolution // teacher_pipeline.vae_scale_factor
        with torch.no_grad(), accelerator.autocast():
            empty = torch.zeros(1, teacher.config.in_channels, side, side, device=device)
            features = teacher_features(empty[:, :channels], torch.zeros(1, device=device), empty)
        discriminator = LatentDiscriminator([feature.shape[1] for feature in features], channels)
        options = {"lr": args.discriminator_learning_rate, "betas": (0.0, 0.99), "weight_decay": 0.0}
        discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), **options)
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)

    model, optimizer = loop.prepare(model, dataset, partial(save_parts, pipeline))

    scores, known = {}, {}
    for batch, generators in loop.batches():
        with accelerator.accumulate(model):
            # A point of the path, and the point one guided step of the teacher earlier.
            batch = with_latents(batch, pipeline.vae, generators)
            batch.pop("category", None)
            noised = noise_batch(args, schedule, batch, generators, embedder.config.num_embeddings, loop.reduce)
            noisy, timesteps, ids = noised.noisy_latents, noised.timesteps, noised.category_ids
            drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(device)
            scale = scales[0] + drawn * (scales[-1] - scales[0])
            with torch.no_grad():
                with accelerator.autocast():
                    prediction = guided_prediction(
                        teacher, noised.model_input, timesteps, foreground, background, scale
                    )
                clean = clean_of(prediction, noisy, timesteps, schedule)
                earlier = timesteps - interval
                earlier_latents = solver_step(clean, noisy, timesteps, earlier, alphas)
                earlier_input = torch.cat([earlier_latents, noised.model_input[:, noisy.shape[1] :]], 1)
                ends, from_earlier = phase_ends(timesteps, args.num_inference_steps), earlier.clamp(min=0)
                prediction = loop.bare_model(earlier_input, from_earlier, ids).sample
                target = clean_of(prediction, earlier_latents, from_earlier, schedule)
                target = solver_step(target, earlier_latents, from_earlier, ends, alphas)
                target = torch.where((earlier == ends)[:, None, None, None], earlier_latents, target)

            # The student goes to the same end of the phase from both.
            output = model(noised.model_input, timesteps, ids)
            clean = clean_of(output.sample, noisy, timesteps, schedule)
            reached = solver_step(clean, noisy, timesteps, ends, alphas)
            # A step is linear in the clean latents: divided by this factor, errors of all phases count alike.
            factor = solver_step(torch.ones_like(clean), torch.zeros_like(clean), timesteps, ends, alphas)
            reached, target = reached / factor, target / factor
            huber_c = args.huber_c if args.loss_type == "huber" else None
            loss = consistency_loss(reached, target, noised.weight, huber_c)
            logged = {"loss": loss.detach(), "to_target": (reached - target).square().mean().detach()}

            # The discriminator compares them, noised anew, with the true ones.
            if discriminator is not None:
                noise = randn_tensor(noisy.shape, generator=generators).to(noisy)
                again = torch.cat([torch.rand(1, generator=g) for g in generators]).to(device)
                again = (again * schedule.config.num_train_timesteps).long()
                given = noised.model_input[:, noisy.shape[1] :].split([1, noisy.shape[1]], 1)
                with accelerator.autocast():
                    fake = teacher_features(schedule.add_noise(clean, noise, again), again, noised.model_input)
                    real = teacher_features(
                        schedule.add_noise(noised.latents, noise, again), again, noised.model_input
                    )
                maps = accelerator.unwrap_model(discriminator)(fake, *given)
                adversarial = generator_loss(maps, noised.hole)
                # By way of the latents alone: the discriminator's own weights get no gradient from this.
                loss = loss + args.adversarial_weight * shortened(adversarial, clean)
                logged |= {"adversarial": adversarial.detach()}
                real = [feature.detach().float().requires_grad_() for feature in real]
                # One pass for both, as data parallelism wants it.
                both = [torch.cat([r, f.detach().float()]) for r, f in zip(real, fake)]
                maps = discriminator(both, *(torch.cat([value] * 2) for value in given))
                real_maps, fake_maps = zip(*(pair.chunk(2) for pair in maps))
                judged = discriminator_loss(real_maps, fake_maps, noised.hole)
                penalty = gradient_penalty(real_maps, real)
                logged |= {"discriminator": judged.detach(), "r1": penalty.detach()}
                judged = judged + args.r1_weight * penalty
                if loop.is_finite(judged):
                    accelerator.backward(judged)
                    discriminator_optimizer.step()
                discriminator_optimizer.zero_grad()

            if loop.is_finite(loss):
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(loop.trained_parameters, args.max_grad_norm)
                    if loop.may_step(norm):
                        optimizer.step()
        loop.end_batch(logged)

        if validation is not None and loop.is_due(args.validation_steps):
            with loop.validation():
                rows, scores = validate(validation, teacher_pipeline, pipeline, args, lpips, known)
            validation.write(loop, rows, scores, known["teacher"])

    # result
    if loop.finished:
        write_results(loop, pipeline, scores)
    accelerator.end_training()


if __name__ == "__main__":
    main()
