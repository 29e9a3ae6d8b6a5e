from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.6",
    "diffusers>=0.41",
    "accelerate>=1.2",
    "safetensors>=0.4.5",
    "huggingface_hub>=1.32",
    "numpy>=1.26",
    "pillow>=10.3",
    "typer>=0.15",
    "tqdm>=4.66",
    "pyyaml>=6.0",
]
EXTRAS = {
    "examples": ["scikit-image>=0.24"],
    "lora": ["peft>=0.17"],
    "train": [
        "braceexpand>=0.1.7",
        "datasets>=3.0",
        "fsspec[http]>=2024.2",
        "torchdata>=0.11",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "peft>=0.17",
        "transformers>=4.56",
    ],
    "perceptual": ["elatentlpips>=0.2"],
    "demo": ["gradio>=6.0", "scikit-image>=0.24", "transformers>=4.56"],
    "eval": ["opencv-python-headless>=4.10", "scikit-image>=0.24"],
    "bench": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"],
    "fid": ["torch-fidelity>=0.3"],  # brings torchvision; without it the FID takes Inception as TorchScript
}
EXTRAS["dev"] = sorted(
    {
        *EXTRAS["train"],
        *EXTRAS["eval"],
        *EXTRAS["demo"],
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
    package_data={"diffusers_moebius": ["checkpoints/**/*", "py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["moebius=diffusers_moebius.cli:main"]},
)
