import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import load_script, open_data
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
    SwinConfig,
)

from diffusers_moebius.training.data import TrainingBatches


@pytest.fixture(scope="module")
def script():
    return load_script("prepare_masks")


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={0: "cat", 1: "sky"},
        label2id={"cat": 0, "sky": 1},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 8,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "mlp_dim": 16,
            "num_pos_feats": 4,
            "global_attn_indexes": [0],
            "window_size": 2,
        },
        prompt_encoder_config={
            "hidden_size": 8,
            "image_size": 32,
            "patch_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 8,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 8,
            "iou_head_depth": 2,
        },
    )
    SamModel(config).save_pretrained(folder)
    processor = SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})
    SamProcessor(processor).save_pretrained(folder)
    return folder


def command(model, photo_dir, out, *options):
    options = {"score_threshold": 0, "min_area": 0.001, "max_area": 0.999, "device": "cpu"} | dict(options)
    arguments = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={photo_dir}", f"--output_dir={out}"]
    return arguments + [f"--{name}={value}" for name, value in options.items()]


def read_lines(out):
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def test_masks_of_an_instance_model_train(script, mask2former, photo_dir, tmp_path, caplog):
    out = tmp_path / "out"
    script.main(command(mask2former, photo_dir, out))
    lines = read_lines(out)
    photos = {line["image"] for line in lines}
    assert len(photos) == 12 and sum(line["category"] == "background" for line in lines) == 12
    objects = [line for line in lines if line["category"] == "foreground"]
    assert objects and all(Image.open(out / line["mask"]).size == (48, 40) for line in objects)
    assert "1 unreadable photos skipped" in caplog.text and "03-broken.jpg" in caplog.text
    data = open_data(16, train_metadata=[out / "metadata.jsonl"])
    batch = next(iter(TrainingBatches(data, len(lines), 0)))
    assert sorted(batch["category"].tolist()) == [0] * 12 + [1] * len(objects)


def test_masks_of_a_sam(script, sam, photo_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(script, "MIN_STABILITY", 0)  # a random model is sure of nothing
    monkeypatch.setattr(script, "STABILITY_OFFSET", 0)
    script.main(command(sam, photo_dir, out, ("score_threshold", -100), ("points_per_side", 2)))
    objects = [line for line in read_lines(out) if "mask" in line]
    assert objects
    for line in objects:
        mask = np.asarray(Image.open(out / line["mask"]))
        assert mask.shape == (40, 48) and set(np.unique(mask)) <= {0, 255} and 0 < (mask > 0).mean() < 1


def test_sam_masks_of_one_object_are_kept_once(script, sam, photo_dir, monkeypatch):
    monkeypatch.setattr(script, "MIN_STABILITY", 0)
    monkeypatch.setattr(script, "STABILITY_OFFSET", 0)
    args = script.parse_args(command(sam, photo_dir, "out", ("score_threshold", -100), ("points_per_side", 4)))
    segments = script.load_segmenter(args)(Image.open(photo_dir / "00.png").convert("RGB"))
    assert 0 < len(segments) < 48  # sixteen points, three masks each
    for number, (mask, _, _) in enumerate(segments):
        for other, _, _ in segments[:number]:
            assert (mask & other).sum() <= 0.7 * (mask | other).sum()


def test_interrupted_run_goes_on_and_ends_the_same(script, mask2former, photo_dir, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    script.main(command(mask2former, photo_dir, whole))
    save_mask, calls = script.save_mask, []

    def interrupted(mask, path):
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        save_mask(mask, path)

    monkeypatch.setattr(script, "save_mask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(command(mask2former, photo_dir, out))
    with (out / "metadata.jsonl").open("a") as file:  # killed within a line
        file.write('{"half')
    before = len(calls)
    script.main(command(mask2former, photo_dir, out))
    assert read_lines(out) == read_lines(whole)
    assert len(calls) - before < sum("mask" in line for line in read_lines(whole))
    assert not list(out.rglob("*.part"))
    for line in read_lines(out):
        if "mask" in line:
            assert (out / line["mask"]).read_bytes() == (whole / line["mask"]).read_bytes()
    with pytest.raises(ValueError, match="`output_dir`"):
        script.main(command(mask2former, photo_dir, out, ("dilation", 2)))


def test_choice_by_area_label_and_number(script):
    masks = [np.zeros((40, 40), bool) for _ in range(4)]
    for mask, side in zip(masks, (2, 8, 12, 38)):
        mask[1 : 1 + side, 1 : 1 + side] = True
    segments = list(zip(masks, (0.9, 0.5, 0.8, 0.99), ("cat", "dog", "sky", "cat")))

    def chosen(*options):
        args = script.parse_args(
            ["--pretrained_model_name_or_path=m", "--train_data_dir=p", "--output_dir=o", *options]
        )
        return [(int(mask.sum()), category) for mask, category in script.choose(segments, args)]

    assert chosen() == [(144, "foreground"), (64, "foreground")]  # the surest first; 4 and 1444 of 1600 are out
    assert chosen("--background_labels", "sky") == [(144, "background"), (64, "foreground")]
    assert chosen("--labels", "dog") == [(64, "foreground")]
    assert chosen("--max_masks_per_photo", "1") == [(144, "foreground")]
    assert chosen("--dilation", "1") == [(16, "foreground"), (196, "foreground"), (100, "foreground")]


def test_models_labels_and_areas_that_do_not_fit_are_refused(script, mask2former, photo_dir, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"`labels`.*zebra"):
        script.main(command(mask2former, photo_dir, tmp_path / "a", ("labels", "zebra")))
    SwinConfig().save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match=r"`pretrained_model_name_or_path`.*'swin'"):
        script.main(command(tmp_path / "swin", photo_dir, tmp_path / "b"))
    with pytest.raises(SystemExit):
        script.parse_args(command(mask2former, photo_dir, "c", ("min_area", 1)))
    assert "`--min_area`" in capsys.readouterr().err
