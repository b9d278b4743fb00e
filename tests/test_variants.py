"""Variants of a run: from its own initialisation, with the time embedding in every block, on the
classes of a subset alone."""

import json
from dataclasses import replace

import pytest
import torch
from test_models import clip, small

from timefast import load_model
from timefast.build import build_model
from timefast.config import ModelConfig, TrainConfig
from timefast.data import open_videos
from timefast.data.subsets import labels_of, restrict
from timefast.errors import InputError
from timefast.eval.__main__ import main as evaluate
from timefast.train import main as train

SIZES = {"image_size": 32, "patch_size": 16, "dim": 32, "depth": 2, "heads": 2, "frames": 4}


def built(**fields):
    return build_model(TrainConfig(model=ModelConfig(**SIZES, **fields)), 5, initial_weights=False)


@pytest.mark.parametrize("backbone", ["timesformer", "motionformer", "xvit"])
def test_without_weights_a_model_has_an_initialisation_of_its_own(backbone):
    scratch = built(backbone=backbone, weights="none")
    assert scratch.config["init"] == "scratch"
    assert built(backbone=backbone).config["init"] == "published"
    asked = built(backbone=backbone, weights="none", init="published")
    assert asked.config["init"] == "published"
    time = {"timesformer": "time_embed", "motionformer": "temp_embed"}.get(
        backbone, "base_model.temp_embed"
    )
    assert scratch.state_dict()[time].abs().max() > 0.1  # order is there from the first step on
    assert asked.state_dict()[time].abs().max() == 0
    if backbone == "timesformer":
        assert all(b.temporal_fc.weight.abs().max() > 0 for b in scratch.blocks)
        assert all(b.temporal_fc.weight.abs().max() == 0 for b in asked.blocks)


@pytest.mark.parametrize("backbone", ["timesformer", "motionformer", "xvit"])
def test_time_embedding_before_every_block_is_the_plain_sum(backbone):
    """The same as the plain model with the embedding added to what goes into the later blocks."""
    again = small(backbone, time_embed_every_block=True).eval()
    plain = small(backbone).eval()
    plain.load_state_dict(again.state_dict())
    video = clip()
    assert not torch.allclose(again(video), plain(video))
    table = (again.base_model.temp_embed[0] if backbone == "xvit" else
             again.time_embed[0, :, None] if backbone == "timesformer" else
             again.temp_embed[0, :, None])  # [T, 1, C]  # fmt: skip

    def add(_module, inputs):
        *cls, x, pending = inputs
        return (*cls, x + table, pending)

    plain.blocks[1].register_forward_pre_hook(add)
    torch.testing.assert_close(plain(video), again(video))


def test_a_subset_is_a_data_set_of_its_own(tiny_run, tmp_path):
    videos = open_videos(tiny_run.parent / "data", "validation")
    few = restrict(videos, videos.subsets["static"])
    assert len(few.classes) == 4 and len(few.records) == 4
    assert {r.label for r in few.records} == {0, 1, 2, 3}
    assert all(few.classes[r.label] == r.template for r in few.records)
    assert few.subsets == {"static": (0, 1, 2, 3)}
    names = tmp_path / "names.txt"
    names.write_text("Showing [something] red\nLifting something up\n")
    assert labels_of(videos, str(names)) == (2, 8)
    assert restrict(videos, (2, 8)).classes == ("Lifting something up", "Showing something red")
    with pytest.raises(InputError, match="has no train video of the 2 classes"):
        restrict(replace(videos, split="train", records=videos.records[:8]), (8, 9))


def test_a_run_of_all_variants_trains_and_is_evaluated_on_its_classes(tiny_run, tmp_path, capsys):
    data, out = tiny_run.parent / "data", tmp_path / "run"
    flags = ["--recipe", "demo", "--data", str(data), "--out", str(out), "--workers", "0"]
    small_run = [
        "--depth",
        "2",
        "--dim",
        "32",
        "--heads",
        "2",
        "--max-steps",
        "2",
        "--device",
        "cpu",
    ]
    variants = ["--weights", "none", "--init", "auto", "--time-embed-every-block"]
    assert train([*flags, *small_run, *variants, "--subset", "temporal"]) == 0
    record = json.loads((out / "config.json").read_text())
    assert record["model"]["init"] == "scratch" and record["model"]["time_embed_every_block"]
    assert len(record["classes"]) == 8 == load_model(out).num_classes
    assert load_model(out).time_embed_every_block
    capsys.readouterr()
    assert evaluate([str(out), "--workers", "0", "--shuffled"]) == 0
    assert "8/8" in capsys.readouterr().out
    assert evaluate([str(tiny_run), "--workers", "0", "--data", str(tmp_path)]) == 2
    assert train([*flags, *small_run, "--subset", "nope", "--out", str(tmp_path / "b")]) == 2
    assert "neither a file nor a subset" in capsys.readouterr().err
