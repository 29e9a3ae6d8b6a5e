"""app.py on a ZeroGPU Space, with a `spaces` package that notes what is asked of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parents[2] / "spaces" / "app.py"
SPACES = """
events, inside = [], False

def GPU(duration):
    def decorate(function):
        def wrapper(*args):
            global inside
            events.append(["lend", duration(*args)])
            inside = True
            try:
                yield from function(*args)
            finally:
                inside = False
        return wrapper
    return decorate
"""
# Runs app.py; where it would serve, it runs the model with two numbers of steps and stops a third run.
SCRIPT = """
import json, pathlib, runpy, sys, tempfile, threading

import spaces
import numpy as np
import gradio
from PIL import Image
from diffusers import DiffusionPipeline

load = DiffusionPipeline.from_pretrained.__func__

def from_pretrained(cls, location, checkpoint=None, **kwargs):
    spaces.events.append(["load", str(location), checkpoint, spaces.inside])
    return load(cls, sys.argv[2])

def to(self, *args, **kwargs):
    spaces.events.append(["to", str(args[0]), spaces.inside])
    return self

def launch(self, **kwargs):
    from diffusers_moebius.demo import inpainting
    from diffusers_moebius.demo.photos import Photo
    from diffusers_moebius.pictures.files import ImageMetadata
    spaces.events.append(["serve"])
    shelf = inpainting._shelf
    photo = Photo(Image.new("RGB", (64, 64), "red"), ImageMetadata(), "red")
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    for steps, stopped in ((3, False), (9, False), (50, True)):
        flag = pathlib.Path(tempfile.mkdtemp()) / "stop"
        settings = inpainting.Settings(shelf.resolve(shelf.default), steps, None, 0, 0, 16, False)
        count = 0
        for output in inpainting.generate(photo, mask, settings, str(flag)):
            count += 1
            if stopped:
                flag.touch()
        spaces.events.append(["outputs", count, isinstance(output, Image.Image)])

from diffusers_moebius import MoebiusInpaintPipeline

MoebiusInpaintPipeline.from_pretrained = classmethod(from_pretrained)
MoebiusInpaintPipeline.to = to
gradio.Blocks.launch = launch
runpy.run_path(sys.argv[1], run_name="__main__")
for thread in threading.enumerate():  # the stopped run may be in its last step, which an exit would break off
    if "(work)" in thread.name:
        thread.join()
print(json.dumps(spaces.events))
"""


@pytest.mark.slow
@pytest.mark.parametrize("zero_gpu", [True, False])
def test_app(tmp_path, pipeline_folder, zero_gpu):
    (tmp_path / "spaces.py").write_text(SPACES)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MOEBIUS", "SPACES"))}
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"SPACES_ZERO_GPU": "true"} if zero_gpu else {}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(APP), str(pipeline_folder)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    events = json.loads(done.stdout.splitlines()[-1])
    served = events.index(["serve"])
    before, after = events[:served], events[served + 1 :]
    if zero_gpu:
        assert before == [["load", "hustvl/Moebius", "ft_places2", False], ["to", "cuda", False]]
        assert not [event for event in after if event[0] in ("load", "to")]
    else:
        assert before == []  # the bundled model, when it is needed
        (load,) = [event for event in after if event[0] == "load"]
        assert Path(load[1]).name == "nano"
    durations = [event[1] for event in after if event[0] == "lend"]
    assert durations[0] < durations[1] < durations[2]
    first, second, stopped = [event[1:] for event in after if event[0] == "outputs"]
    assert first[1] and second[1] and second[0] > first[0]
    assert not stopped[1] and stopped[0] < 10
