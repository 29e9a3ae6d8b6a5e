"""Modules that are joined into one file for machines without this package."""

import ast
import sys

import pytest
from diffusers.utils.dynamic_modules_utils import get_relative_imports

from diffusers_moebius.loaders import remote_code
from diffusers_moebius.loaders.remote_code import self_contained_source

PIPELINE = "diffusers_moebius.pipelines.pipeline_moebius_inpaint"
KNOWN = {"PIL", "accelerate", "diffusers", "huggingface_hub", "numpy", "peft", "safetensors", "torch", "yaml"}


@pytest.mark.parametrize(
    "name",
    [
        PIPELINE,
        "diffusers_moebius.models.latent_categories",
        "diffusers_moebius.models.unet_2d_moebius",
        "diffusers_moebius.models.unet_2d_pixelhacker",
    ],
)
def test_our_code_can_travel(name, tmp_path):
    __import__(name)
    source = self_contained_source(name)
    path = tmp_path / "module.py"
    path.write_text(source)
    assert get_relative_imports(path) == []
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {module.partition(".")[0] for module in imported} - set(sys.stdlib_module_names) <= KNOWN
    names = {}
    exec(compile(source, path, "exec"), names | {"__name__": "somewhere.module"})


def test_module_without_imports_of_ours_is_copied_as_it_is():
    name = "diffusers_moebius.models.latent_categories"
    __import__(name)
    with open(sys.modules[name].__file__) as file:
        assert self_contained_source(name) == file.read()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package that `remote_code` takes for ours."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(remote_code, "_PACKAGE", "travelling")
    (tmp_path / "travelling" / "inner").mkdir(parents=True)
    for folder in ("travelling", "travelling/inner"):
        (tmp_path / folder / "__init__.py").touch()

    def write(**sources):
        for name, source in sources.items():
            (tmp_path / "travelling" / f"{name.replace('__', '/')}.py").write_text(source)

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "travelling"]:
        del sys.modules[name]


def run(source):
    names = {"__name__": "joined"}
    exec(source, names)
    return names


def test_joins_in_the_order_of_imports(package):
    package(
        base="VALUE = 2\n",
        inner__middle="from ..base import VALUE\n\ndef double():\n    return 2 * VALUE\n",
        top=(
            "import math\n"
            "from travelling.base import (\n    VALUE,\n)\n"
            "from .inner.middle import double\n\n"
            "def total():\n"
            "    if True:\n"
            "        from .base import VALUE\n"
            "    return math.floor(double() + VALUE)\n"
        ),
    )
    source = self_contained_source("travelling.top")
    assert "travelling import" not in source and "from ." not in source
    assert source.count("VALUE = 2") == 1
    assert run(source)["total"]() == 6


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"base": "X = 1\nY = [1]\n", "top": "from .base import X\nY = [2]\n"}, "`Y` is not the same in both"),
        (
            {"base": "import json as j\nX = 1\n", "top": "from .base import X\nimport ast as j\n"},
            "`j` is not the same",
        ),
        ({"base": "X = 1\n", "top": "from .base import X as Y\n"}, "must import names of ours as they are"),
        ({"base": "X = 1\n", "top": "from .base import *\n"}, "must import names of ours as they are"),
        ({"base": "X = 1\n", "top": "import travelling.base\n"}, "must import names from our modules"),
        ({"base": "X = 1\n", "top": "from . import base\n"}, "not from the package"),
        ({"base": "def f():\n    from .top import g\n", "top": "from .base import f\ng = 1\n"}, "imports it in turn"),
    ],
)
def test_what_cannot_be_joined(package, sources, message):
    package(**sources)
    with pytest.raises(ValueError, match=message):
        self_contained_source("travelling.top")


def test_loggers_may_share_a_name(package):
    text = "import logging\nlogger = logging.getLogger(__name__)\n"
    package(base=text + "X = 1\n", top=text + "from .base import X\n")
    assert run(self_contained_source("travelling.top"))["X"] == 1
