import argparse

import pytest
from runs import load_script

SCRIPTS = ("train_distillation", "train_few_step", "train_inpainting", "train_tiny_vae")


class Built(Exception):
    """Raised in place of parsing, with the parser."""


@pytest.fixture(params=SCRIPTS)
def parser(request, monkeypatch):
    script = load_script(request.param)

    def raise_built(self, arguments=None):
        raise Built(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", raise_built)
    with pytest.raises(Built) as built:
        script.parse_args([])
    return built.value.args[0]


def test_every_option_has_a_text_and_its_default(parser):
    formatter = parser._get_formatter()
    actions = [action for action in parser._actions if action.dest != "help"]
    assert len(actions) > 30
    for action in actions:
        text = formatter._expand_help(action)
        assert action.help and len(text.partition("(default")[0]) > 7, action.dest
        assert action.required or "default: " in text, action.dest
    assert len(parser.format_help().splitlines()) > len(actions)


def test_options_have_the_names_of_the_examples_of_diffusers(parser):
    names = {option.removeprefix("--") for option in parser._option_string_actions}
    shared = "max_train_samples num_train_epochs use_8bit_adam random_flip train_batch_size max_train_steps"
    shared += " resume_from_checkpoint checkpoints_total_limit validation_steps push_to_hub hub_model_id report_to"
    assert set(shared.split()) <= names and "train_shards_path_or_url" in names
