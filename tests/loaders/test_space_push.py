"""`moebius space push`, against the stand-in for the hub."""

import huggingface_hub
import pytest

from diffusers_moebius.cli import main


@pytest.fixture
def staged(tmp_path):
    """What `make space` would gather."""
    folder = tmp_path / "space"
    (folder / "screenshots").mkdir(parents=True)
    for name in ("app.py", "README.md", "requirements.txt", "package-2.whl", "screenshots/a.png"):
        (folder / name).write_text(f"{name} of the demo")
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(["space", "push", *map(str, arguments)])
    return caught.value.code


def test_a_space_is_made_and_updated(hub, staged, capsys):
    arguments = ("somebody/page", "--folder", staged)
    assert run(*arguments) == 0
    assert capsys.readouterr().out == f"{hub.url}/somebody/page\n"
    repository = hub.repositories["somebody/page"]
    names = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    assert repository.files("main").keys() == names and not repository.variables

    (staged / "package-2.whl").rename(staged / "package-3.whl")
    assert run(*arguments, "--model", "hustvl/Moebius") == 0
    files = repository.files("main")
    assert files["package-3.whl"] == b"package-2.whl of the demo" and "package-2.whl" not in files
    assert repository.variables == {"MOEBIUS_DEMO_MODEL": "hustvl/Moebius"}


def test_private(hub, staged, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(staged / "none"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run("somebody/page", "--folder", staged, "--private") == 0
    assert hub.repositories["somebody/page"].token == "hf_secret"


@pytest.mark.parametrize("missing", ["app.py", "README.md", "requirements.txt"])
def test_what_is_not_staged_is_named(hub, staged, capsys, missing):
    (staged / missing).unlink()
    assert run("somebody/page", "--folder", staged) == 2
    assert missing in (error := capsys.readouterr().err) and "make space" in error
    assert not hub.repositories


def test_a_hub_that_refuses_is_one_line(hub, staged, capsys):
    hub.stop()
    assert run("somebody/page", "--folder", staged) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"moebius: error: {staged} cannot be pushed to somebody/page: ")
