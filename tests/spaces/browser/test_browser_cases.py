"""What the browser's page computes itself: the same cases through the package and through its TypeScript."""

import json
import os
import subprocess

import diffusers
import numpy as np
import pytest
import torch
from browser_noise import browser_noise
from page_settings import EXACT
from PIL import Image

from diffusers_moebius.pictures import detail
from diffusers_moebius.pictures.mask import dilate_mask, mask_box
from diffusers_moebius.pictures.paste import feather_inwards, match_edges, paste_fill
from diffusers_moebius.pictures.picture import load_pictures
from diffusers_moebius.pictures.region import (
    ModelSizes,
    crop_region,
    fill_hole,
    find_region,
    pad_to_multiple,
    resize,
    resize_mask,
    working_size,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler_case(name, steps, begin=0, **settings):
    """All that a scheduler does in a run, for a model that answers with noise."""
    torch.manual_seed(len(name) + steps)
    scheduler = getattr(diffusers, name)(**BETAS, **settings)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    image, noise = torch.randn(2, 1, 1, 2, 3)
    latents = scheduler.add_noise(image, noise, scheduler.timesteps[begin : begin + 1])
    case = {
        "config": {"_class_name": name, **scheduler.config},
        "steps": steps,
        "begin": begin,
        "timesteps": scheduler.timesteps,
        "image": image,
        "noise": noise,
        "start": latents,
        "run": [],
    }
    for i, t in enumerate(scheduler.timesteps[begin:]):
        prediction = torch.randn(latents.shape)
        options = {"eta": 0.0} if name in ("DDIMScheduler", "TCDScheduler") else {}
        if name == "LCMScheduler":
            options["generator"] = torch.Generator().manual_seed(i)
        fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(i))
        latents = scheduler.step(prediction, t, latents, **options).prev_sample
        case["run"].append({"prediction": prediction, "fresh": fresh, "latents": latents})
    return case


def scheduler_cases():
    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return [
        scheduler_case("DDIMScheduler", 20, begin=1, clip_sample=False),
        scheduler_case("DDIMScheduler", 7, clip_sample=True, timestep_spacing="linspace", set_alpha_to_one=False),
        scheduler_case("DDIMScheduler", 3, clip_sample=False, set_alpha_to_one=False, **zero_snr),
        scheduler_case("DDIMScheduler", 1, clip_sample=False, timestep_spacing="trailing", prediction_type="sample"),
        scheduler_case("DDIMScheduler", 30, begin=10, clip_sample=False, steps_offset=1),
        scheduler_case("UniPCMultistepScheduler", 5, timestep_spacing="trailing"),
        scheduler_case(
            "UniPCMultistepScheduler",
            10,
            begin=2,
            timestep_spacing="leading",
            solver_type="bh1",
            final_sigmas_type="sigma_min",
        ),
        scheduler_case("UniPCMultistepScheduler", 6, prediction_type="sample", solver_order=1),
        scheduler_case("UniPCMultistepScheduler", 5, **zero_snr),
        scheduler_case("LCMScheduler", 4, clip_sample=False),
        scheduler_case("LCMScheduler", 8, begin=3, prediction_type="v_prediction"),
        scheduler_case("TCDScheduler", 4),
        scheduler_case("TCDScheduler", 6, begin=2, prediction_type="sample"),
    ]


def guidance_cases(pipeline):
    """Which steps of a run evaluate both branches."""
    batches = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, output: batches.append(len(output[0])))
    image = torch.rand(1, 3, 32, 32)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:16, 8:16] = 1
    cases = []
    for steps, scale, start, end in [(5, 2.5, 0.4, 1), (4, 2, 0, 1), (7, 3, 0.3, 0.8), (3, 1, 0, 1), (1, 2, 0, 1)]:
        batches.clear()
        options = {"guidance_scale": scale, "guidance_start": start, "guidance_end": end, "strength": 1.0}
        pipeline(image, mask, num_inference_steps=steps, **options)
        guided = [size == 2 for size in batches]
        cases.append({"steps": steps, "scale": scale, "start": start, "end": end, "guided": guided})
    hook.remove()
    return cases


def few_step_case(pipeline):
    before = {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
    pipeline.use_few_steps(5)
    pipeline.scheduler.set_timesteps(5)
    config = pipeline.config
    return {
        "scheduler": before,
        "timesteps": pipeline.scheduler.timesteps,
        "steps": config.default_num_inference_steps,
        "strength": config.default_strength,
        "guidanceStart": config.default_guidance_start,
    }


def blob(random, height, width):
    """A mask of a few discs and boxes."""
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(random.integers(1, 4)):
        cy, cx, r = (
            random.integers(0, height),
            random.integers(0, width),
            random.integers(1, max(2, min(height, width) // 3)),
        )
        mask |= (y - cy) ** 2 + (x - cx) ** 2 <= r**2
        mask[cy : cy + r, cx : cx + 2 * r] = True
    return mask


def region_cases():
    random = np.random.default_rng(0)
    cases = []
    for height, width, margin, native in [(60, 90, 8, 32), (300, 40, 0, 64), (33, 500, 64, 256), (17, 16, 3, 512)]:
        mask = blob(random, height, width)
        box = crop_region(mask, margin, 16)
        size = working_size(box[3] - box[1], box[2] - box[0], native)
        resized = resize_mask(torch.from_numpy(mask.astype(np.float32))[None, None], *size)
        cases.append(
            {
                "mask": mask,
                "margin": margin,
                "native": native,
                "maskBox": mask_box(mask, margin),
                "box": box,
                "size": size,
                "resizedMask": resized[0, 0],
                "dilated": dilate_mask(mask, 5),
            }
        )
    return cases


def resize_cases():
    torch.manual_seed(0)
    cases = []
    for source, target in [
        ((12, 9), (5, 7)),
        ((7, 8), (20, 31)),
        ((40, 3), (6, 3)),
        ((5, 5), (5, 9)),
        ((1, 30), (2, 11)),
    ]:
        image = torch.rand(1, 2, *source)
        padded = pad_to_multiple(image, 16)
        cases.append({"image": image[0], "size": target, "resized": resize(image, *target)[0], "padded": padded[0]})
    return cases


def paste_cases():
    random = np.random.default_rng(1)
    cases = []
    for height, width, margin in [(50, 70, 6), (64, 48, 0), (130, 150, 10), (9, 200, 4)]:
        mask = blob(random, height, width)
        if height == 130:
            mask[:, 40:120] = True  # thick enough for a ramp, from border to border
        left, top, right, bottom = box = crop_region(mask, margin, 4)
        photo = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        fill = random.random((bottom - top, right - left, 3), dtype=np.float32)
        picture = load_pictures(photo)[0]
        hole = mask[top:bottom, left:right]
        cases.append(
            {
                "photo": photo,
                "mask": mask,
                "box": box,
                "fill": fill.transpose(2, 0, 1),
                "weights": feather_inwards(mask),
                "matched": match_edges(fill, picture.rgb(box), hole).transpose(2, 0, 1),
                **{mode: paste_fill(picture, fill, mask, box, mode).samples for mode in ("exact", "seamless")},
            }
        )
    return cases


def generator_cases():
    cases = []
    for seed, limit in [(0, 7), (5, 2**28 - 1), (2**32 - 1, 2**31)]:
        generator = torch.Generator().manual_seed(seed)
        integers = torch.randint(limit, (700,), generator=generator)  # more than the generator makes at once
        uniform = torch.rand(5, generator=generator)
        cases.append({"seed": seed, "limit": limit, "integers": integers, "uniform": uniform})
    return cases


def textured(random, height, width):
    """A photo without a pattern, no two places of which are alike; smooth, since noise has no principal components."""
    coarse = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def hole_cases():
    """Smooth fillings, blurs and roughness around a hole."""
    random = np.random.default_rng(2)
    cases = []
    for height, width in [(40, 61), (7, 90)]:
        image = torch.from_numpy(textured(random, height, width)).permute(2, 0, 1) / 255
        hole = torch.from_numpy(blob(random, height, width))
        cases.append(
            {
                "image": image,
                "hole": hole,
                "filled": fill_hole(image[None], hole[None, None].float())[0],
                "blurred": detail._blur(image, 2.5),
                "rough": detail._roughness(image, ~hole),
            }
        )
    return cases


def patch_cases():
    """One hole filled with patches: by comparing all pairs, by the random search, below full size, and copied."""
    random = np.random.default_rng(3)
    cases = []
    for number, (settings, lead, copy) in enumerate(
        [
            ({}, detail.UNLED, False),
            ({"exact": 10_000}, detail.LED, False),
            ({"search_pixels": 5000}, detail.UNLED, False),
            ({"lead_sigma": 1.2}, 2.0, True),
        ]
    ):
        image = torch.from_numpy(textured(random, 90, 101)).permute(2, 0, 1) / 255
        hole = torch.zeros(90, 101, dtype=torch.bool)
        hole[30:60, 25 + 20 * number : 60 + 20 * number] = True  # the last one reaches the border
        source = ~torch.from_numpy(dilate_mask(hole.numpy(), 4))
        guide = fill_hole(image[None], hole[None, None].float())[0]
        generator = torch.Generator().manual_seed(number)
        filled = detail.fill_with_patches(
            image, hole, source, guide, lead, generator, detail.Settings(**settings), copy
        )
        errors = detail.held_out_errors(image, hole, source, torch.Generator().manual_seed(number))
        cases.append(
            {
                "image": image,
                "hole": hole,
                "source": source,
                "guide": guide,
                "lead": lead,
                "seed": number,
                "settings": camel(settings),
                "copy": copy,
                "filled": filled,
                "errors": errors,
            }
        )
    return cases


def camel(settings):
    """Names as TypeScript writes them."""
    return {
        "".join(word.title() if i else word for i, word in enumerate(name.split("_"))): value
        for name, value in settings.items()
    }


def detail_cases():
    random = np.random.default_rng(4)
    cases = []
    modes = [("patches", 256, 20), ("patches", 64, 64), ("enlarged", 64, 30), ("enlarged", 256, 8)]
    for mode, native, margin in modes:
        photo = textured(random, 120, 150)
        mask = np.zeros((120, 150), bool)
        mask[20:45, 30:58] = True
        mask[80:86, 100:] = True  # far from the other one, to the border
        if native == 64 and mode == "patches":
            mask[10:110, 20:130] = True  # most of the photo
        region = find_region(load_pictures(photo)[0], mask, ModelSizes(8, native, 16), margin)
        left, top, right, bottom = region.box
        fill = random.random((bottom - top, right - left, 3), dtype=np.float32)
        result = detail.add_detail(fill, region, mode, torch.Generator().manual_seed(len(cases)))
        cases.append(
            {
                "photo": photo,
                "mask": mask,
                "box": region.box,
                "enlargement": region.enlargement,
                "fill": fill.transpose(2, 0, 1),
                "detail": mode,
                "seed": len(cases),
                "result": result.transpose(2, 0, 1),
            }
        )
    return cases


def detail_constants():
    names = ("RIM", "LARGE", "STRANGE", "LED", "UNLED", "SMOOTH")
    settings = (camel(each._replace(exact=EXACT)._asdict()) for each in (detail.Settings(), detail.ENLARGED))
    return {name: getattr(detail, name) for name in names}, *settings


def plain(value):
    """Arrays as their shape and numbers, for JSON."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return {"shape": value.shape, "data": value.astype(float).ravel().tolist()}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.slow
def test_typescript_computes_what_the_package_computes(browser_folder, tiny_pipeline, tmp_path):
    cases = {
        "noise": [
            {"seed": seed, "start": start, "values": browser_noise(seed, 9, start)}
            for seed, start in [(0, 0), (1, 5), (2**32 - 1, 10**6)]
        ],
        "schedulers": scheduler_cases(),
        "guidance": guidance_cases(tiny_pipeline),
        "fewSteps": few_step_case(tiny_pipeline),
        "regions": region_cases(),
        "resizes": resize_cases(),
        "pastes": paste_cases(),
        "generators": generator_cases(),
        "holes": hole_cases(),
        "detailConstants": detail_constants(),
        "patches": patch_cases(),
        "details": detail_cases(),
    }
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(plain(cases)))
    command = ["npm", "test", "--silent"]
    environment = {**os.environ, "MOEBIUS_CASES": str(path)}
    run = subprocess.run(command, cwd=browser_folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_noise_is_standard_normal():
    values = browser_noise(7, 100_000)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(values, browser_noise(8, 100_000))[0, 1]) < 0.01
