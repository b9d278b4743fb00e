"""Reading weights: every one is accounted for, nothing in a file is executed."""

import argparse
import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from test_models import SMALL, clip, small

from timefast import create_model, load_model
from timefast.checkpoint import save_checkpoint
from timefast.convert import (
    from_huggingface,
    from_timesformer,
    recognise,
    to_huggingface,
    to_timesformer,
)
from timefast.errors import InputError
from timefast.weights import load_imagenet


def state(**config) -> dict[str, torch.Tensor]:
    return dict(small(**config).state_dict())


def image_state(classes: int = 5) -> dict[str, torch.Tensor]:
    """An ImageNet ViT in timm's layout: the spatial half of the model."""
    return state(attention="space", time_heads=False, num_classes=classes)


@pytest.mark.parametrize("wrapper", ["bare", "model_state", "state_dict", "ddp", "half"])
def test_wrappings_of_a_checkpoint_file(tmp_path, wrapper):
    model = small().eval()
    value = dict(model.state_dict())
    if wrapper == "ddp":
        value = {f"module.{key}": tensor for key, tensor in value.items()}
    if wrapper == "half":
        value = {key: tensor.half() for key, tensor in value.items()}
    if wrapper in ("model_state", "state_dict"):
        value = {"epoch": 3, wrapper: value, "cfg": "TRAIN: {}", "optimizer_state": {"state": {}}}
    torch.save(value, tmp_path / "checkpoint.pyth")
    loaded = load_model(tmp_path / "checkpoint.pyth", heads=2).eval()
    video = clip()
    if wrapper == "half":
        assert loaded.head.weight.dtype == torch.float32
        torch.testing.assert_close(loaded(video), model(video), rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(loaded(video), model(video))
    report = loaded.load_report
    assert len(report.loaded) == len(model.state_dict()) and len(report.sha256) == 64
    assert not (report.converted or report.at_init or report.unexpected or report.unused)


def test_options_beside_the_weights_are_accepted(tmp_path):
    torch.save({"model": state(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    load_model(tmp_path / "a.pth", heads=2)


def test_sizes_depth_and_attention_are_recognised():
    wanted = {"num_classes": 3, "frames": 6, "image_size": 24, "patch_size": 8, "dim": 48,
              "depth": 3, "heads": 3, "mlp_ratio": 2.5, "attention": "joint"}  # fmt: skip
    model = load_model(create_model("timesformer", **wanted).state_dict(), heads=3)
    assert {key: model.config[key] for key in wanted} == wanted
    assert model.normalisation == {"mean": [0.5] * 3, "std": [0.5] * 3}
    space = load_model(state(attention="space"), heads=2)
    assert space.config["attention"] == "space" and space.frames == 4
    with pytest.raises(InputError, match="6 patches, which is no square grid.*image_size="):
        load_model(state(image_size=(16, 24)), heads=2)
    with pytest.raises(InputError, match="width 32 does not tell how many.*heads="):
        load_model(state())


def test_missing_and_extra_weights_need_consent():
    lacking = state()
    del lacking["blocks.1.norm1.bias"]
    lacking["blocks.1.norm9.bias"] = torch.zeros(3)
    with pytest.raises(InputError) as error:
        load_model(lacking, heads=2)
    assert "left at init: blocks.1.norm1.bias" in str(error.value)
    assert "unexpected: blocks.1.norm9.bias" in str(error.value)
    report = load_model(lacking, heads=2, strict=False).load_report
    assert report.at_init == ["blocks.1.norm1.bias"]
    assert report.unexpected == ["blocks.1.norm9.bias"]


def test_wrong_shapes_are_refused_also_when_not_strict():
    wrong = state()
    wrong["blocks.0.attn.proj.weight"] = torch.zeros(1, 32)  # would broadcast
    wrong["mlp_q.bias"] = torch.zeros(1)
    for strict in (True, False):
        with pytest.raises(InputError, match=r"attn.proj.weight: expected \[32, 32\], got \[1, 32"):
            load_model(wrong, heads=2, strict=strict)


def test_keywords_against_the_file_are_refused():
    with pytest.raises(InputError, match="holds a timesformer with depth=2, not 12"):
        load_model(state(), heads=2, depth=12)
    with pytest.raises(InputError, match="heads: expected a divisor of dim=32, got 5"):
        load_model(state(), heads=5)
    with pytest.raises(InputError, match="takes no keyword dpeth"):
        load_model(state(), heads=2, dpeth=2)
    with pytest.raises(InputError, match="holds a timesformer.*not a xvit"):
        load_model(state(), backbone="xvit", heads=2)


def test_a_new_classifier_is_made_on_request_only():
    with pytest.raises(InputError, match=r"left at init: head.weight, head.bias"):
        load_model(state(), heads=2, num_classes=7)
    model = load_model(state(), heads=2, num_classes=7, strict=False)
    assert model(clip()).shape == (2, 7)
    assert set(model.load_report.unused) == {"head.weight", "head.bias"}
    plain = load_model(state(), heads=2, time_heads=False)
    assert "flow_head.bias" in plain.load_report.unused and not plain.load_report.at_init


def test_other_lengths_and_sizes_resize_the_tables():
    model = small()
    longer = load_model(model.state_dict(), heads=2, frames=6, image_size=24, strict=False)
    assert longer.time_embed.shape == (1, 6, 32) and longer.pos_embed.shape == (1, 10, 32)
    rows = [0, 0, 1, 2, 2, 3]  # floor(t * 4 / 6)
    assert torch.equal(longer.time_embed[0], model.time_embed[0, rows])
    assert set(longer.load_report.converted) == {"time_embed", "pos_embed"}
    assert longer.load_report.at_init == ["temp_head.weight", "temp_head.bias"]
    video = clip(T=6, height=24, width=24)
    torch.testing.assert_close(longer.eval()(video), model.eval()(video))


def test_nothing_in_a_pickle_is_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"model_state": {**state(), "x": Payload()}}, tmp_path / "bad.pyth")
    # not the advice of torch to run it all the same
    with pytest.raises(
        InputError, match="running code from it, which is refused [^`]*posix.system [^`]*$"
    ):
        load_model(tmp_path / "bad.pyth", heads=2)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_damaged_files_give_one_clear_error(tmp_path, suffix, content):
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(state(), file)
    else:
        save_file(state(), file)
    data = file.read_bytes()
    file.write_bytes(
        {"truncated": data[: len(data) // 2], "text": b"<html>", "empty": b""}[content]
    )
    with pytest.raises(InputError, match="not a complete|refused"):
        load_model(file, heads=2)


@pytest.mark.parametrize(
    "content", [b"\x1aE\xdf\xa3 a video", b"0", b"\x80\x02q", b"hello\n", b"M"], ids=repr
)
def test_bytes_that_are_no_checkpoint_give_one_clear_error(tmp_path, content):
    file = tmp_path / "clip.webm"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not a complete|refused"):
        load_model(file)


@pytest.mark.parametrize("about", ["{", "[1]", "{}", '{"config": {}, "normalisation": {}}'])
def test_a_damaged_description_of_the_model_is_said(tmp_path, about):
    save_file(state(), tmp_path / "a.safetensors", metadata={"timefast": about})
    with pytest.raises(InputError, match="checkpoint of this project, but not of which model"):
        load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "told",
    [
        {"frames": 0}, {"frames": -1}, {"frames": "four"}, {"image_size": 20}, {"image_size": 0},
        {"image_size": [16]}, {"image_size": "big"}, {"num_classes": "x"}, {"drop_path": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_sizes_name_themselves(told):
    with pytest.raises(InputError, match=next(iter(told)) + "|supported between"):
        load_model(state(), heads=2, strict=False, **told)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "nothing.pth")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="no known family has these keys: conv1.weight"):
        load_model({"conv1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="expected tensors only, but not so epoch"):
        load_model({"cls_token": torch.zeros(1), "epoch": 3})


def test_a_run_folder_gives_its_newest_checkpoint(tmp_path):
    model = small(drop_path=0.3).eval()
    about = {"config": model.config, "classes": list("abcde"), "normalisation": {
        "mean": [0.1] * 3, "std": [0.2] * 3}}  # fmt: skip
    save_checkpoint(tmp_path, 1, small().state_dict(), {}, about)
    newest = save_checkpoint(tmp_path, 20, model.state_dict(), {}, about)
    video = clip()
    for source in (tmp_path, newest, newest / "model.safetensors"):
        loaded = load_model(source).eval()
        assert torch.equal(loaded(video), model(video))
        assert loaded.classes == list("abcde") and loaded.normalisation["mean"] == [0.1] * 3
        assert loaded.config == model.config and loaded.load_report.family == "timefast"
    with pytest.raises(InputError, match="with heads=2, not 4"):
        load_model(tmp_path, heads=4)


def test_recognising_families():
    native = state()
    assert recognise(native) == "time_timesformer"
    assert recognise(to_timesformer(native)) == "timesformer"
    assert recognise(to_huggingface(native)) == "huggingface"
    assert recognise(image_state()) == "imagenet"


def test_foreign_layouts_and_back_give_the_same_weights():
    plain = state(time_heads=False)
    for there, back in ((to_timesformer, from_timesformer), (to_huggingface, from_huggingface)):
        foreign = there(state())
        assert set(foreign).isdisjoint(plain)
        converted = back(foreign).state
        assert set(converted) == set(plain)
        assert all(torch.equal(there(converted)[key], foreign[key]) for key in foreign)
        model = load_model(foreign, heads=2)
        assert model.normalisation == {"mean": [0.45] * 3, "std": [0.225] * 3}
        assert not model.has_time_heads


@pytest.mark.parametrize("attention", ["divided", "joint"])
def test_folder_of_hugging_face(tmp_path, attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimesformerConfig(
        attention_type=f"{attention}_space_time",
        image_size=16, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, num_labels=5,
    )  # fmt: skip
    theirs = transformers.TimesformerForVideoClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    assert ours.config["heads"] == 2 and ours.config["mlp_ratio"] == 2.0
    assert ours.config["attention"] == attention
    assert ours.classes is None  # LABEL_0, LABEL_1, ... are no names
    video = clip()
    with torch.no_grad():
        expected = theirs(pixel_values=video.transpose(1, 2)).logits
        torch.testing.assert_close(ours(video), expected)
    bare = load_model(dict(theirs.timesformer.state_dict()), heads=2, num_classes=5, strict=False)
    assert bare.load_report.at_init == ["head.weight", "head.bias"]
    torch.testing.assert_close(bare.eval().features(video).cls, ours.features(video).cls)
    edited = json.loads((tmp_path / "config.json").read_text())
    names = {str(i): f"Moving [something] {i}" for i in range(5)}
    (tmp_path / "config.json").write_text(json.dumps({**edited, "id2label": names}))
    assert load_model(tmp_path).classes[3] == "Moving something 3"
    (tmp_path / "config.json").write_text(json.dumps({**edited, "hidden_act": "relu"}))
    with pytest.raises(InputError, match="hidden_act='relu' is not supported"):
        load_model(tmp_path)


def test_an_image_model_answers_for_a_still_clip(tmp_path):
    """With ImageNet weights the video model begins as the image model."""
    image = small(attention="space", time_heads=False).eval()
    torch.save({"model": image.state_dict()}, tmp_path / "vit.pth")
    model = create_model("timesformer", **SMALL).eval()
    report = load_imagenet(model, tmp_path / "vit.pth")
    frame = clip(T=1)
    video = frame.expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(model(video), image(frame))
    assert report.converted["blocks.0.temporal_attn.qkv.weight"] == (
        "copied from blocks.0.attn.qkv.weight"
    )
    assert torch.equal(model.blocks[1].temporal_norm1.bias, image.blocks[1].norm1.bias)
    assert {key.split(".")[0] for key in report.at_init} == {
        "time_embed", "blocks", "temp_head", "mlp_q", "mlp_k", "mlp_v", "mlp_proj", "mlp_norm",
        "flow_head",
    }  # fmt: skip


def test_an_image_model_starts_the_frames_of_an_xvit(tmp_path):
    vit = image_state()
    save_file(vit, tmp_path / "vit.safetensors")
    model = create_model("xvit", **SMALL)
    head = model.consensus.head.weight.clone()
    report = load_imagenet(model, tmp_path / "vit.safetensors")
    assert torch.equal(model.blocks[1].attn.qkv.weight, vit["blocks.1.attn.qkv.weight"])
    assert torch.equal(model.base_model.cls_token, vit["cls_token"])
    assert report.converted["base_model.pos_embed"] == "resized to 28x28 patches (bilinear)"
    assert set(report.unused) == {"head.weight", "head.bias"} and not report.unexpected
    assert torch.equal(model.consensus.head.weight, head)  # keeps its initialisation


def test_image_weights_of_another_grid_and_classifier_are_adapted(tmp_path):
    vit = image_state(classes=10)
    save_file(vit, tmp_path / "vit.safetensors")
    model = create_model("timesformer", **{**SMALL, "image_size": 24})
    report = load_imagenet(model, tmp_path / "vit.safetensors")
    assert report.converted["pos_embed"] == "resized to 3x3 patches (bicubic)"
    assert set(report.unused) == {"head.weight", "head.bias"}
    assert torch.equal(model.pos_embed[:, 0], vit["pos_embed"][:, 0])


def test_a_patch_weight_stored_flat_is_reshaped():
    flat = image_state()
    flat["patch_embed.proj.weight"] = flat["patch_embed.proj.weight"].flatten(1)
    model = load_model(flat, backbone="timesformer", heads=2, frames=4, strict=False)
    assert torch.equal(model.patch_embed.proj.weight.flatten(1), flat["patch_embed.proj.weight"])


def test_an_image_model_needs_a_backbone_and_consent():
    with pytest.raises(InputError, match="ImageNet ViT, which can start any backbone"):
        load_model(image_state(), heads=2)
    with pytest.raises(InputError, match="left at init: time_embed"):
        load_model(image_state(), backbone="timesformer", heads=2)
    model = load_model(image_state(), backbone="timesformer", heads=2, strict=False, frames=4)
    assert model.num_classes == 5 and model.frames == 4


def test_image_weights_of_another_size_or_kind_are_refused(tmp_path):
    torch.save(image_state(), tmp_path / "vit.pth")
    torch.save(state(), tmp_path / "video.pth")
    with pytest.raises(InputError, match="lacks blocks.2"):
        load_imagenet(create_model("timesformer", **{**SMALL, "depth": 3}), tmp_path / "vit.pth")
    with pytest.raises(InputError, match="do not have the model's shape"):
        load_imagenet(create_model("timesformer", **{**SMALL, "dim": 48}), tmp_path / "vit.pth")
    with pytest.raises(InputError, match="holds a video model"):
        load_imagenet(create_model("timesformer", **SMALL), tmp_path / "video.pth")
    with pytest.raises(InputError, match="no such file"):
        load_imagenet(create_model("timesformer", **SMALL), tmp_path / "missing.pth")


def test_image_weights_without_network_give_one_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def offline(name, file, **keywords):
        asked.append((name, file))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match="neither in the cache nor to be had") as error:
        load_imagenet(small(), "imagenet")
    assert "\n" not in str(error.value)
    assert set(asked) == {("timm/vit_base_patch16_224.orig_in21k_ft_in1k", "model.safetensors")}


@pytest.mark.parametrize(
    ("name", "hint"), [("imagnet", "; did you mean imagenet?"), ("vit_base_patch16_224", "; Give")]
)
def test_a_name_that_nobody_knows_is_refused_without_network(monkeypatch, name, hint):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match=f"^initial weights '{name}': .*{re.escape(hint)}"):
        load_imagenet(small(), name)


@pytest.mark.parametrize("name", ["some.tag", "owner/name"])
def test_names_of_the_hub_are_asked_for(monkeypatch, tmp_path, name):
    torch.save(image_state(), tmp_path / "vit.pth")
    asked = []

    def download(name, file, **keywords):
        asked.append(name)
        return tmp_path / "vit.pth"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_imagenet(small(), name)
    assert asked == [name if "/" in name else f"timm/{name}"]


def test_a_width_that_does_not_tell_the_heads_names_keyword_and_flag():
    with pytest.raises(InputError, match=r"pass heads= \(a command: --heads\)$"):
        load_model(state())
