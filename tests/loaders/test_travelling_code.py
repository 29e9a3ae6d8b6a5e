"""The code that is saved with a pipeline, for machines without this package."""

import re
from pathlib import Path

import pytest
from diffusers.utils.dynamic_modules_utils import get_relative_imports

import diffusers_moebius
from diffusers_moebius.loaders import travelling_code
from diffusers_moebius.loaders.travelling_code import travelling_files, write_code
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

PACKAGE = Path(diffusers_moebius.__file__).parent
CLASSES = [MoebiusInpaintPipeline, MoebiusUNet2DModel, PixelHackerUNet2DModel]


@pytest.mark.parametrize("cls", CLASSES)
def test_files_are_those_of_the_package_but_for_the_lines_of_imports(cls):
    files = travelling_files(cls.__module__)
    assert f"{cls.__module__.rpartition('.')[2]}.py" in files
    for name, text in files.items():
        folders = (PACKAGE, PACKAGE / "models", PACKAGE / "pictures", PACKAGE / "pipelines")
        (original,) = [path for path in PACKAGE.rglob(name) if path.parent in folders]
        ours, theirs = original.read_text(encoding="utf-8").splitlines(), text.splitlines()
        assert len(ours) == len(theirs)
        for before, after in zip(ours, theirs, strict=True):
            if before != after:
                indent, module, names = re.fullmatch(r"( *)from \.+(?:\w+\.)*(\w+) import (.*)", before).groups()
                assert after == f"{indent}from . {module} import {names}"


@pytest.mark.parametrize("cls", CLASSES)
def test_all_that_is_imported_travels_except_for_loaders(cls, tmp_path):
    files = travelling_files(cls.__module__)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert get_relative_imports(tmp_path / name) == []  # diffusers looks for none of them
        assert not re.findall(r"^ *(?:from|import) (?:diffusers_moebius|\.+ import)", text, re.MULTILINE)
        imported = {f"{module}.py" for module in re.findall(r"^ *from \. (\w+) import", text, re.MULTILINE)}
        assert imported - files.keys() <= {"hub.py", "lora.py"}
    assert not files.keys() & {"hub.py", "lora.py", "model_card.py", "release_checkpoint.py", "files.py"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package that is taken for ours."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(travelling_code, "LOADERS", "travelling.loaders")
    for folder in ("travelling/inner", "travelling/loaders"):
        (tmp_path / folder).mkdir(parents=True)

    def write(**sources):
        for name, source in sources.items():
            (tmp_path / "travelling" / f"{name.replace('__', '/')}.py").write_text(source)

    return write


def test_import_lines(package):
    package(
        base="X = '''\nfrom .base import X is not an import here\n'''\n",
        inner__middle="import os\nfrom ..base import (\n    X,\n)\nfrom .other import Y as Z\n",
        inner__other="from diffusers.utils import logging\nY = 1\n",
        loaders__files="from ..nowhere import A\n",
        top=(
            "def run():\n    from .inner.middle import X\n    from travelling.base import X\n"
            "    from .loaders.files import A\n"
        ),
    )
    files = travelling_files("travelling.top")
    assert files.keys() == {"top.py", "middle.py", "base.py", "other.py"}
    assert files["top.py"] == (
        "def run():\n    from . middle import X\n    from travelling.base import X\n    from . files import A\n"
    )
    assert files["middle.py"] == "import os\nfrom . base import (\n    X,\n)\nfrom . other import Y as Z\n"
    assert files["other.py"] == "from diffusers.utils import logging\nY = 1\n"


def test_the_file_that_diffusers_loads_names_all_others(package, tmp_path):
    package(base="X = 1\n", top="from .base import X\nclass A: ...\n", model="from .base import X\n")
    there = write_code(tmp_path / "out" / "unet", "load_unet", "travelling.model", "B")
    assert there.keys() == {"model.py", "base.py"}
    assert set(get_relative_imports(tmp_path / "out" / "unet" / "load_unet.py")) == {"model", "base"}
    assert write_code(tmp_path / "out", "load_it", "travelling.top", "A", {"unet": there}).keys() == {"top.py"}
    assert set(get_relative_imports(tmp_path / "out" / "load_it.py")) == {"top", "unet.base", "unet.model"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"top.py", "load_it.py", "unet"}
