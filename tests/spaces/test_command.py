"""`moebius demo` and `moebius push`."""

import sys
from types import SimpleNamespace

import pytest

import diffusers_moebius.demo
from diffusers_moebius import MoebiusInpaintPipeline
from diffusers_moebius.cli import main


def call(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return caught.value.code


def test_demo_serves_with_what_it_was_given(monkeypatch, capsys, pipeline_folder):
    calls = []
    monkeypatch.setattr(diffusers_moebius.demo, "launch_demo", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert call("demo") == 0
    assert "starting the page at http://127.0.0.1:7860" in capsys.readouterr().err
    assert call("demo", "--host", "0.0.0.0", "--port", "80", "--model", str(pipeline_folder), "--share") == 0
    assert calls == [
        (("nano",), {"host": "127.0.0.1", "port": 7860, "share": False}),
        ((str(pipeline_folder),), {"host": "0.0.0.0", "port": 80, "share": True}),
    ]


def test_demo_refuses_what_is_no_model(capsys):
    assert call("demo", "--model", "no/such/model/at/all") == 2
    assert "`--model`" in capsys.readouterr().err


def test_demo_says_how_to_install_gradio(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("diffusers_moebius.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert call("demo") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "starting the page" in first and "diffusers-moebius[demo]" in second  # said before anything is imported


def test_push_uploads_the_model(monkeypatch, capsys, pipeline_folder):
    calls = []

    def push(self, repo_id, **kwargs):
        calls.append((type(self), repo_id, kwargs))
        return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(MoebiusInpaintPipeline, "push_to_hub", push)
    assert call("push", str(pipeline_folder), "me/model", "--private") == 0
    assert calls == [(MoebiusInpaintPipeline, "me/model", {"private": True})]
    assert capsys.readouterr().out == "https://hub/commit/1\n"


def test_push_says_what_went_wrong(monkeypatch, capsys, pipeline_folder):
    def push(self, repo_id, **kwargs):
        raise OSError("no token")

    monkeypatch.setattr(MoebiusInpaintPipeline, "push_to_hub", push)
    assert call("push", str(pipeline_folder), "me/model") == 2
    assert "no token" in capsys.readouterr().err
