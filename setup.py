from pathlib import Path

from setuptools import find_packages, setup

# Where another project may change what is used here, the limit is the newest release that the tests pass with;
# `make test-floor` runs them with the oldest ones.
CORE = [
    "torch>=2.6",
    "diffusers>=0.41,<0.43",
    "accelerate>=1.2",
    "safetensors>=0.4.5",
    "huggingface_hub>=1.32,<3",
    "numpy>=1.26",
    "pillow>=10.3",
    "typer>=0.15",
    "tqdm>=4.66",  # the command line's progress
    "jinja2>=3.1",  # model cards
    "pyyaml>=6.0",  # configs of the release
]
PEFT = "peft>=0.18,<0.22"
GRADIO = "gradio>=6.0,<6.32"
EXTRAS = {
    "examples": ["scikit-image>=0.24"],
    "heic": ["pillow-heif>=0.18"],  # photos of phones; not in the core for its size (6 MB) and x265's licence (GPL)
    "parquet": ["pyarrow>=15"],
    "ray": ["ray[data]>=2.51"],
    "lora": [PEFT],
    "train": [
        "braceexpand>=0.1.7",
        "datasets>=3.0",
        "fsspec[http]>=2024.2",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "torchdata>=0.11",
        "transformers>=4.56",
        PEFT,
    ],
    "perceptual": ["elatentlpips>=0.2"],
    "demo": [
        GRADIO,
        "opencv-python-headless>=4.10",
        "pillow-heif>=0.18",
        "scikit-image>=0.24",
        "transformers>=4.56",
    ],
    "eval": [
        "opencv-python-headless>=4.10",
        "scikit-image>=0.24",
        "pypatchmatch>=2.2; python_version >= '3.11'",
        "tomli>=2.0; python_version < '3.11'",
    ],
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20"],
    "lpips": ["lpips>=0.1.4"],  # brings torchvision, and downloads AlexNet; without it LPIPS takes weights from a file
    "fid": ["torch-fidelity>=0.3"],  # brings torchvision; without it the FID takes Inception as TorchScript
}
EXTRAS["dev"] = sorted(
    {
        *EXTRAS["train"],
        *EXTRAS["eval"],
        *EXTRAS["demo"],
        *EXTRAS["onnx"],
        *EXTRAS["heic"],
        *EXTRAS["parquet"],
        *EXTRAS["ray"],
        "playwright>=1.49",
        "hypothesis>=6.100",
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
    }
)

setup(
    name="diffusers-moebius",
    version="0.1.0",
    description="Moebius image inpainting for diffusers: model, pipeline, training and command line.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    include_package_data=True,
    package_data={"diffusers_moebius": ["checkpoints/**/*", "demo/static/*", "loaders/*.md", "py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["moebius=diffusers_moebius.cli:main"]},
)
