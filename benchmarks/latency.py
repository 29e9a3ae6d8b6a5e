#!/usr/bin/env python3
"""Measures time, memory and multiply-adds of a guided denoising step and prints them as Markdown tables.

    python benchmarks/latency.py --json latency.json
    python benchmarks/latency.py --sizes 512 --variants reference folded compiled

The model is that of the paper, with random weights, unless `--config` names another configuration.
A guided step is one evaluation of the U-Net for both branches of one picture (batch 2). The rows:

- reference: the lambda layers by their formulas, BatchNorm not folded; every ratio and difference refers to it.
- fast: the fast lambda processors, which are the default.
- folded: `prepare_for_inference()`: BatchNorm folded, channels last, the upsampling on the small grid.
- bf16, fp16: folded, in half precision; on a CPU only where it multiplies bfloat16 in hardware, fp16 on GPUs only.
- compiled: folded, by `torch.compile` (on GPUs in bfloat16, `max-autotune`).
- onnx: the graph that `moebius export` writes, in ONNX Runtime; at batch 2.

How it is measured:

- Time: after a warm-up the rows take turns, `--rounds` times; a row's time is the median of its rounds, its spread
  half of the distance between the fastest and the slowest, its ratio the median of its rounds' ratios to the first
  row's time in the same round. Wall time and, on CPUs, processor time of the process.
- Peak memory above the weights: on a CPU each row runs in a process of its own; after a warm-up what the allocator has
  kept is given back, the high-water mark of the resident memory is reset, and the mark after one more step is compared
  with the resident memory before it (Linux only). On a GPU: `torch.cuda.max_memory_allocated`.
- Multiply-adds: those of convolutions and matrix products, for one picture in one branch, counted on the meta device.
- Floor: the multiply-adds of the folded row at the rate that a large float32 matrix product reaches in the same run.
"""

import argparse
import copy
import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from PIL import Image

from diffusers_moebius import LatentCategoriesEmbedder, MoebiusInpaintPipeline, MoebiusUNet2DModel
from diffusers_moebius.models import multiply_adds
from diffusers_moebius.pictures.paste import paste_fill
from diffusers_moebius.pictures.region import ModelSizes, find_regions
from diffusers_moebius.pipelines.latents import decode_pictures, encode_latents, stack_regions

VARIANTS = ("reference", "fast", "folded", "bf16", "fp16", "compiled", "onnx")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cpu_model() -> str:
    """The processor's name, with its number of cores and the threads that PyTorch uses."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX-512 BF16, AMX, or Arm's extension)."""
    if not Path("/proc/cpuinfo").is_file():
        return False
    words = set(Path("/proc/cpuinfo").read_text().split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def why_not(variant: str, device: str) -> str | None:
    """Why a row cannot be measured on this machine; `None` if it can."""
    if variant == "bf16" and device == "cpu" and not cpu_has_bfloat16():
        return "no bfloat16 arithmetic in this processor"
    if variant == "fp16" and device == "cpu":
        return "GPUs only"
    if variant == "compiled" and device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler, and there is none"
    if variant == "onnx":
        if device != "cpu":
            return "CPU only"
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {', '.join(missing)}: `pip install diffusers-moebius[onnx]`"
    return None


def make_model(config: dict) -> MoebiusUNet2DModel:
    """A model with random weights and BatchNorm statistics that do something."""
    torch.manual_seed(0)
    model = MoebiusUNet2DModel(**config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def make_inputs(model: MoebiusUNet2DModel, height: int, width: int, batch: int) -> tuple[torch.Tensor, ...]:
    """Sample, timestep and context of a step at a size in pixels."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    sample = torch.randn(batch // 2, config.in_channels, height // 8, width // 8, generator=generator).repeat(
        2, 1, 1, 1
    )
    context = torch.randn(batch, config.context_length, config.encoder_hid_dim, generator=generator)
    return sample, torch.tensor(500), context


def make_step(variant: str, model: MoebiusUNet2DModel, device: str, inputs: tuple[torch.Tensor, ...]) -> Step:
    """
    Prepares one row.

    Args:
        variant (`str`): One of `VARIANTS`.
        model ([`MoebiusUNet2DModel`]): The model, which is changed.
        device (`str`): `"cpu"` or `"cuda"`.
        inputs (`tuple[torch.Tensor, ...]`): What the step will be called with; exporting needs it.

    Returns:
        Callable that takes sample, timestep and context in float32 and returns the prediction.
    """
    model.set_lambda_algorithm("reference" if variant == "reference" else "fast")
    if variant == "onnx":
        return export_to_onnx(model, inputs)
    if variant not in ("reference", "fast"):
        model.fuse_for_inference()
    dtype = DTYPES.get(variant, torch.bfloat16 if (variant, device) == ("compiled", "cuda") else torch.float32)
    model.to(device)
    if dtype != torch.float32:  # else diffusers warns of layers that have to stay in it
        model.to(dtype)
    if variant == "compiled":
        model.compile(fullgraph=True, mode="max-autotune" if device == "cuda" else None)

    def step(sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(sample.to(dtype), timestep, context.to(dtype), return_dict=False)[0]

    return step


def export_to_onnx(model: MoebiusUNet2DModel, inputs: tuple[torch.Tensor, ...]) -> Step:
    from diffusers_moebius.export.onnx_graphs import write_unet
    from diffusers_moebius.export.onnx_pipeline import OnnxGraph

    context = inputs[2]  # of background and foreground, which become part of the graph
    categories = torch.tensor([0.0, 1.0])[:, None, None]
    with tempfile.TemporaryDirectory() as folder:
        write_unet(model, context, Path(folder, "unet"))
        graph = OnnxGraph(Path(folder, "unet"), ["CPUExecutionProvider"])

    def step(sample: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return graph.run(sample=sample, timestep=timestep.reshape(1), encoder_hidden_states=categories)

    return step


def count_multiply_adds(variant: str, config: dict, height: int, width: int) -> int:
    """Multiply-adds of one picture in one branch."""
    with torch.device("meta"):
        model = MoebiusUNet2DModel(**config).eval().requires_grad_(False)
    model.set_lambda_algorithm("reference" if variant == "reference" else "fast")
    if variant not in ("reference", "fast"):
        model.fuse_for_inference()
    sample = (1, model.config.in_channels, height // 8, width // 8)
    context = (1, model.config.context_length, model.config.encoder_hid_dim)
    return multiply_adds.count_multiply_adds(model, sample, (1,), context)


def matrix_product_rate(device: str, size: int = 2048, repeats: int = 5) -> float:
    """Multiply-adds a second of a float32 matrix product of `size` x `size`, the median of some repeats."""
    a, b, out = (torch.randn(size, size, device=device) for _ in range(3))
    seconds = []
    for _ in range(repeats + 1):
        start = now(device)
        torch.mm(a, b, out=out)
        seconds.append(now(device) - start)
    return size**3 / statistics.median(seconds[1:])


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_bytes(entry: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return 1024 * int(line.split()[1])


def measure_memory(variant: str, config: dict, device: str, height: int, width: int, batch: int) -> int | None:
    """Peak memory in bytes of one step above what is held before it; on a CPU in a fresh process."""
    if device == "cuda":
        return _measure_memory(variant, config, device, height, width, batch, torch.get_num_threads())
    if not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        arguments = (variant, config, device, height, width, batch, torch.get_num_threads())
        return pool.apply(_measure_memory, arguments)


def _measure_memory(variant: str, config: dict, device: str, height: int, width: int, batch: int, threads: int) -> int:
    torch.set_num_threads(threads)
    model = make_model(config)
    inputs = make_inputs(model, height, width, batch)
    step = make_step(variant, model, device, inputs)
    inputs = tuple(tensor.to(device) for tensor in inputs)
    for _ in range(2 if device == "cpu" else 4):  # a compiled step with CUDA graphs is recorded in its second call
        step(*inputs)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(*inputs)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(*inputs)
    return resident_bytes("VmHWM") - before


def measure_times(
    variants: list[str], config: dict, device: str, height: int, width: int, batch: int, rounds: int
) -> dict[str, dict]:
    """Seconds of each round and the largest difference from the reference, relative to its largest value, by row."""
    base = make_model(config)
    inputs = make_inputs(base, height, width, batch)
    steps, results = {}, {}
    for variant in variants:
        try:
            steps[variant] = make_step(variant, copy.deepcopy(base), device, inputs)
        except Exception as error:  # compilers and exporters fail in ways of their own; the other rows go on
            results[variant] = {"skipped": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
    del base
    inputs = tuple(tensor.to(device) for tensor in inputs)
    reference = None
    for variant, step in list(steps.items()):
        try:
            start = now(device)
            output = step(*inputs).float()
            first = now(device) - start
        except Exception as error:
            results[variant] = {"skipped": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
            del steps[variant]
            continue
        reference = output if reference is None else reference
        difference = ((output - reference).abs().max() / reference.abs().max()).item()
        results[variant] = {"wall": [], "cpu": [], "difference": difference, "first_call": first}
    for variant in steps:  # CUDA graphs are recorded in the second call
        step = steps[variant]
        if device == "cuda":
            for _ in range(3):
                step(*inputs)
    calls = 1 if device == "cpu" else 20
    for _ in range(rounds):
        for variant, step in steps.items():
            wall, cpu = now(device), time.process_time()
            for _ in range(calls):
                step(*inputs)
            results[variant]["wall"].append((now(device) - wall) / calls)
            results[variant]["cpu"].append((time.process_time() - cpu) / calls)
    return results


def measure_size(args: argparse.Namespace, device: str, height: int, width: int, batch: int) -> dict:
    """All rows at one size and batch."""
    rows: dict[str, dict] = {}
    possible = []
    for variant in args.variants:
        reason = why_not(variant, device)
        if reason is None:
            possible.append(variant)
        else:
            rows[variant] = {"skipped": reason}
    rate = matrix_product_rate(device)
    rows |= measure_times(possible, args.config, device, height, width, batch, args.rounds)
    reference = rows[args.variants[0]]
    for variant in args.variants:
        row = rows[variant]
        if "skipped" in row:
            continue
        for clock in ("wall", "cpu"):
            ratios = [a / b for a, b in zip(row[clock], reference[clock])]
            row[f"{clock}_ratio"] = statistics.median(ratios)
        row["multiply_adds"] = count_multiply_adds(variant, args.config, height, width)
        row["peak_bytes"] = measure_memory(variant, args.config, device, height, width, batch)
    floor = batch * count_multiply_adds("folded", args.config, height, width) / rate
    ordered = {variant: rows[variant] for variant in args.variants}
    return {
        "height": height,
        "width": width,
        "batch": batch,
        "device": device,
        "rows": ordered,
        "matrix_product_rate": rate,
        "floor": floor,
    }


def make_pipeline(config: dict, vae_widths: tuple[int, ...], tiny_vae: str | None) -> MoebiusInpaintPipeline:
    """A pipeline with random weights; its autoencoder has the shape of the published one but for its widths."""
    model = make_model(config)
    levels = len(vae_widths)
    vae = AutoencoderKL(
        block_out_channels=vae_widths,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=2,
        norm_num_groups=min(32, *vae_widths),
        scaling_factor=0.13025,
    ).eval()
    embedder = LatentCategoriesEmbedder(2 * model.config.context_length, model.config.encoder_hid_dim)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    pipe = MoebiusInpaintPipeline(vae, model, embedder, scheduler)
    return pipe.use_tiny_decoder(AutoencoderTiny().eval() if tiny_vae is None else tiny_vae)  # of its default size


def make_parts(pipe: MoebiusInpaintPipeline, device: str) -> dict[str, Callable]:
    """The parts of a run on a picture of 512 px, in their order."""
    y, x = np.mgrid[:512, :512]
    photo = Image.fromarray(np.stack([x // 2, y // 2, (x + y) // 4], -1).astype(np.uint8))
    (region,) = find_regions([photo], [(abs(x - 256) < 90) & (abs(y - 256) < 120)], ModelSizes())
    image, mask = stack_regions([region], device)
    sample, timestep, context = (tensor.to(device) for tensor in make_inputs(pipe.unet, 512, 512, 2))
    latents = sample[:1, :4]
    fill = image[0] / 2 + 0.5
    return {
        "encode": lambda: encode_latents(pipe.vae, image * (1 - mask)),
        "guided step": lambda: pipe.unet(sample, timestep, context),
        "plain step": lambda: pipe.unet(sample[:1], timestep, context[:1]),
        "decode": lambda: decode_pictures(pipe.vae, latents),
        "tiny decode": lambda: decode_pictures(pipe.tiny_vae, latents),
        "paste": lambda: paste_fill(region.picture, region.fill(fill), region.mask, region.box),
    }


def measure_whole_run(
    config: dict,
    device: str,
    steps: int,
    rounds: int = 1,
    vae_widths: tuple[int, ...] = (128, 256, 512, 512),
    tiny_vae: str | None = None,
) -> dict:
    """
    What the parts of a run at 512 px take, and whole runs made up of them.

    Each part is timed once a round, in turns, after a round that does not count. Runs are sums. Those of 20 steps have
    `strength` 0.99, which encodes twice and leaves out a step; few steps encode once, and two of five are not guided.

    Args:
        config (`dict`): The U-Net's configuration.
        device (`str`): `"cpu"` or `"cuda"`.
        steps (`int`): Steps of the schedule in a default run.
        rounds (`int`, defaults to 1): How often each part is timed.
        vae_widths (`tuple[int, ...]`): Widths of the autoencoder's levels.
        tiny_vae (`str`, *optional*): Folder or repository of the tiny autoencoder; random weights by default.

    Returns:
        `dict`: `parts` (processor seconds, on GPUs seconds, by variant and part), `runs` (the same by run and stage)
        and `difference` (of the prepared decoder from that as loaded, in grey levels).
    """
    clock = time.process_time if device == "cpu" else lambda: now(device)
    pipes = {name: make_pipeline(config, vae_widths, tiny_vae).to(device) for name in ("as loaded", "prepared")}
    pipes["prepared"].prepare_for_inference()
    jobs = {name: make_parts(pipe, device) for name, pipe in pipes.items()}
    jobs["reference"] = {name: jobs["as loaded"][name] for name in ("guided step", "plain step")}
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name, parts in jobs.items()}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, parts in jobs.items():
                pipes["as loaded"].unet.set_lambda_algorithm("reference" if name == "reference" else "fast")
                for part, run in parts.items():
                    start = clock()
                    run()
                    if turn:
                        seconds[name][part].append(clock() - start)
        pictures = [jobs[name]["decode"]() for name in pipes]
    parts = {name: {part: statistics.median(each) for part, each in row.items()} for name, row in seconds.items()}
    parts["reference"] = parts["as loaded"] | parts["reference"]  # the processors are those of the U-Net alone
    runs = {}
    for run, name, encodes, guided, plain, decode in (
        ("original", "reference", 2, int(0.99 * steps), 0, "decode"),
        ("as loaded", "as loaded", 2, int(0.99 * steps), 0, "decode"),
        ("default", "prepared", 2, int(0.99 * steps), 0, "decode"),
        ("few steps", "prepared", 1, 3, 2, "decode"),
        ("fast", "prepared", 1, 3, 2, "tiny decode"),
    ):
        row = parts[name]
        runs[run] = {
            "encode": encodes * row["encode"],
            "denoise": guided * row["guided step"] + plain * row["plain step"],
            "decode": row[decode],
            "paste": row["paste"],
        }
    return {"parts": parts, "runs": runs, "difference": 255 * (pictures[0] - pictures[1]).abs().max().item()}


def whole_run_table(result: dict) -> str:
    """Parts and runs as Markdown tables."""
    names = list(result["parts"]["as loaded"])
    lines = ["| 512 px, s | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for variant, row in result["parts"].items():
        lines.append(f"| {variant} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
    first = sum(result["runs"]["original"].values())
    lines += [
        "",
        "| whole run, 512 px, s | encode | denoise | decode | paste | sum | ratio |",
        "|---" + "|---:" * 6 + "|",
    ]
    for name, row in result["runs"].items():
        total = sum(row.values())
        cells = [f"{value:.2f}" for value in [*row.values(), total]]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {total / first:.3f} |")
    lines += ["", f"Decoded pictures, prepared against as loaded: {result['difference']:.4f} grey levels at most."]
    return "\n".join(lines)


def measure_import() -> dict[str, float]:
    """Seconds of a fresh interpreter for torch, what any pipeline of diffusers imports, and then this package's."""
    code = (
        "import time; a = time.perf_counter(); import torch;"
        "from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline;"
        "b = time.perf_counter();"
        "from diffusers_moebius import MoebiusInpaintPipeline; print(b - a, time.perf_counter() - b)"
    )
    runs = [
        [float(word) for word in subprocess.check_output([sys.executable, "-c", code], text=True).split()[-2:]]
        for _ in range(3)
    ]
    return {
        "torch_and_diffusers": statistics.median(a for a, _ in runs),
        "package": statistics.median(b for _, b in runs),
    }


# A process of its own starts the command: Linux counts what a process had before it became another program as that
# program's, and this one may have had much.
PRINT_PEAK = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
if status:
    sys.exit(f"{sys.argv[1:]} failed with status {status}")
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def measure_command() -> dict[str, float]:
    """Seconds and peak resident bytes of `moebius inpaint --fast` on a picture of 512 px, from a cold command line."""
    with tempfile.TemporaryDirectory() as folder:
        y, x = np.mgrid[:512, :512]
        Image.fromarray(np.stack([x // 2, y // 2, (x + y) // 4], -1).astype(np.uint8)).save(f"{folder}/photo.png")
        mask = np.where((abs(x - 256) < 90) & (abs(y - 256) < 120), 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(f"{folder}/mask.png")
        seconds, peak = [], []
        for i in range(3):
            files = [f"{folder}/photo.png", f"{folder}/mask.png", "-o", f"{folder}/result{i}.png"]
            command = [sys.executable, "-m", "diffusers_moebius", "inpaint", *files, "--fast"]
            start = time.perf_counter()
            peak.append(int(subprocess.check_output([sys.executable, "-c", PRINT_PEAK, *command])))
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_bytes": max(peak)}


def size_table(result: dict) -> str:
    """One size as a Markdown table."""
    unit, scale, digits = ("ms", 1e3, 2) if result["device"] == "cuda" else ("s", 1, 2)
    lines = [
        f"**{result['width']}×{result['height']} px, batch {result['batch']}**",
        "",
        f"| row | {unit} a step | ratio | ratio of CPU time | multiply-adds | peak memory above the weights | ratio |"
        " largest difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = result["rows"]
    reference = next(iter(rows.values()))
    for name, row in rows.items():
        if "skipped" in row:
            lines.append(f"| {name} | skipped: {row['skipped']} | | | | | | |")
            continue
        spread = (max(row["wall"]) - min(row["wall"])) / 2
        peak = row["peak_bytes"]
        cells = [
            f"{scale * statistics.median(row['wall']):.{digits}f} ± {scale * spread:.{digits}f}",
            f"{row['wall_ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}" if result["device"] == "cpu" else "",
            f"{row['multiply_adds'] / 1e9:.1f} G",
            "not measured" if peak is None else f"{peak / 2**20:.0f} MiB",
            f"{peak / reference['peak_bytes']:.2f}" if peak and reference.get("peak_bytes") else "",
            f"{row['difference']:.1e}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    measured = {name: statistics.median(row["wall"]) for name, row in rows.items() if "wall" in row}
    folded = measured.get("folded")
    lines += [
        "",
        f"Float32 matrix products: {result['matrix_product_rate'] / 1e9:.0f} G multiply-adds a second; at that",
    ]
    lines[-1] += f" rate the folded step would take {scale * result['floor']:.{digits}f} {unit}"
    lines[-1] += f", it takes {folded / result['floor']:.2f} times as long." if folded else "."
    return "\n".join(lines)


def growth_table(results: list[dict]) -> str:
    """Time and memory of the first and of the folded row by size and batch."""
    lines = ["| px | batch | row | s a step | μs a latent position | peak memory above the weights | B a position |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for result in results:
        for name, row in result["rows"].items():
            if name not in ("reference", "folded") or "skipped" in row:
                continue
            positions = result["batch"] * result["height"] * result["width"] / 64
            seconds, peak = statistics.median(row["wall"]), row["peak_bytes"]
            memory = ["", ""] if peak is None else [f"{peak / 2**20:.0f} MiB", f"{peak / positions:.0f}"]
            cells = [f"{result['width']}×{result['height']}", str(result["batch"]), name, f"{seconds:.3f}"]
            lines.append("| " + " | ".join([*cells, f"{1e6 * seconds / positions:.0f}", *memory]) + " |")
    return "\n".join(lines)


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `768x512` (width, then height) as height and width in pixels."""
    width, _, height = text.partition("x")
    try:
        size = int(height or width), int(width)
    except ValueError:
        size = (0, 0)
    if min(size) < 32 or size[0] % 32 or size[1] % 32:
        raise argparse.ArgumentTypeError(f"`--sizes` must be multiples of 32 such as 512 or 768x512, but is {text!r}")
    return size


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, help="JSON file with the U-Net's configuration; default: that of the paper")
    add("--sizes", nargs="*", type=parse_size, default=[(256, 256), (512, 512), (512, 768)], help="e.g. 512 768x512")
    add("--batches", nargs="*", type=int, default=[4], help="further batches, of the first row and folded at 512 px")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:5], help="compiled and onnx take minutes")
    add("--rounds", type=int, default=5)
    add(
        "--whole_run",
        type=int,
        metavar="STEPS",
        help="also what whole runs take, such as 20 steps, from their parts; takes minutes",
    )
    add("--tiny_vae", help="folder or repository of the tiny autoencoder of whole runs; default: random weights")
    add("--threads", type=int, help="threads of PyTorch; default: its own choice")
    add("--devices", nargs="+", choices=("cpu", "cuda"), help="default: the CPU, and the GPU where there is one")
    add("--skip_command", action="store_true", help="leave out import time and command line")
    add("--json", dest="json_file", type=Path, help="file for all numbers")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"`--rounds` must be at least 1, but is {args.rounds}")
    if any(batch < 2 or batch % 2 for batch in args.batches):
        parser.error(f"`--batches` must be even, two for each picture, but are {args.batches}")
    args.config = json.loads(args.config.read_text()) if args.config else {}
    args.config = {name: value for name, value in args.config.items() if not name.startswith("_")}
    args.devices = args.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    args.variants = [variant for variant in VARIANTS if variant in args.variants]
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report = {"cpu": cpu_model(), "torch": torch.__version__, "sizes": []}
    for device in args.devices:
        name = report["cpu"] if device == "cpu" else torch.cuda.get_device_name()
        print(f"## {name}; PyTorch {torch.__version__}\n", flush=True)
        results = []
        jobs = [(height, width, 2, args.variants) for height, width in args.sizes]
        some = [variant for variant in args.variants if variant in ("reference", "folded")]
        jobs += [(512, 512, batch, some) for batch in args.batches if some]
        for height, width, batch, variants in jobs:
            options = argparse.Namespace(**vars(args) | {"variants": variants})
            results.append(measure_size(options, device, height, width, batch))
            print(size_table(results[-1]) + "\n", flush=True)
        print("**Growth with area and batch**\n\n" + growth_table(results) + "\n", flush=True)
        report["sizes"] += results
        if args.whole_run is not None:
            report.setdefault("whole_runs", {})[device] = measure_whole_run(
                args.config, device, args.whole_run, args.rounds, tiny_vae=args.tiny_vae
            )
            print(whole_run_table(report["whole_runs"][device]) + "\n", flush=True)
    if not args.skip_command:
        report["import"] = measure_import()
        report["command"] = measure_command()
        print("| | seconds | peak memory |\n|---|---:|---:|")
        print(f"| import torch and diffusers | {report['import']['torch_and_diffusers']:.2f} | |")
        print(f"| import the package beyond that | {report['import']['package']:.2f} | |")
        command = report["command"]
        print(
            f"| `moebius inpaint --fast` with nano, 512 px, cold | {command['seconds']:.2f} |"
            f" {command['peak_bytes'] / 1e9:.2f} GB |"
        )
    if args.json_file is not None:
        args.json_file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
