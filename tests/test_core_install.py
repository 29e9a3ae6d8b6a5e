"""What `pip install diffusers-moebius` alone must do: transformers and peft come with extras."""

import subprocess
import sys
import textwrap


def run_without_extras(code: str) -> subprocess.CompletedProcess:
    """Runs code in a new process, in which importing transformers and peft fails as if they were not installed."""
    block = "import sys\nsys.modules.update(transformers=None, peft=None)\n"
    return subprocess.run([sys.executable, "-c", block + textwrap.dedent(code)], capture_output=True, text=True)


def test_the_command_line_fills_a_photo(tmp_path):
    run = run_without_extras(f"""
        from PIL import Image
        from diffusers_moebius.cli import main

        Image.new("RGB", (40, 32), "teal").save({str(tmp_path / "photo.png")!r})
        mask = Image.new("L", (40, 32))
        mask.paste(255, (8, 8, 24, 24))
        mask.save({str(tmp_path / "mask.png")!r})
        sys.argv = ["moebius", "inpaint", *{[str(tmp_path / name) for name in ("photo.png", "mask.png")]!r}]
        sys.argv += ["-o", {str(tmp_path / "result.png")!r}, "--fast"]
        main()
    """)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "result.png").is_file()


def test_the_pipeline_imports_no_package_of_an_extra():
    run = run_without_extras("""
        sys.modules.update(dict.fromkeys(["gradio", "datasets", "cv2", "skimage", "scipy", "onnx"]))
        import torch
        from diffusers_moebius import MoebiusInpaintPipeline, bundled_checkpoint

        pipe = MoebiusInpaintPipeline.from_pretrained(bundled_checkpoint("nano")).prepare_for_inference()
        picture, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
        mask[..., 8:24, 8:24] = 1
        print(pipe(image=picture, mask_image=mask, output_type="pt").images.shape)
    """)
    assert "torch.Size([1, 3, 32, 32])" in run.stdout, run.stderr


def test_adapters_say_what_they_need():
    run = run_without_extras("""
        from diffusers_moebius import MoebiusInpaintPipeline, bundled_checkpoint

        MoebiusInpaintPipeline.from_pretrained(bundled_checkpoint("nano")).load_lora_weights("adapter")
    """)
    assert "ImportError: LoRA adapters need the package peft" in run.stderr
