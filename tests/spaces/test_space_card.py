"""The Space's card and files."""

import ast
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData
from packaging.requirements import Requirement
from packaging.version import Version

SPACE = Path(__file__).parents[2] / "spaces"
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
# What the hub documents for Spaces beside the fields that SpaceCardData names.
OTHER_FIELDS = {"emoji", "colorFrom", "colorTo", "short_description", "preload_from_hub"}


def test_card_has_the_fields_of_the_hub():
    card = SpaceCard.load(SPACE / "README.md")
    data = card.data
    assert isinstance(data, SpaceCardData)
    named = set(SpaceCardData(title="x").__dict__)
    assert set(data.to_dict()) <= named | OTHER_FIELDS
    assert data.sdk == "gradio"
    assert Version(data.sdk_version) >= Version("6")
    assert data.python_version in ("3.10", "3.12")  # those of ZeroGPU
    assert (SPACE / data.app_file).is_file()
    assert data.license == "apache-2.0"
    fields = data.to_dict()
    assert {fields["colorFrom"], fields["colorTo"]} <= COLORS
    assert len(fields["short_description"]) <= 60
    assert all(model.count("/") == 1 for model in data.models)


def test_requirements_name_the_package_with_its_extra():
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").split()
    requirements = [Requirement(line) for line in lines]
    assert [(r.name, r.extras) for r in requirements] == [("diffusers-moebius", {"demo"})]


def test_app_imports_spaces_before_torch():
    tree = ast.parse((SPACE / "app.py").read_text(encoding="utf-8"))
    order = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in sorted(
            (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)), key=lambda n: n.lineno
        )
        for alias in node.names
    ]
    assert order.index("spaces") < order.index("diffusers_moebius.demo")
