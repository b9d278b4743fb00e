"""python -m timefast.convert."""

import json
import logging

import pytest
import torch
from golden_rule import part, read_golden
from safetensors.torch import load_file, save_file
from test_models import clip, small
from test_models_golden import TIME, UPSTREAM, layout

from timefast import load_model
from timefast.convert import TARGETS, from_xvit, main, to_xvit
from timefast.errors import InputError
from timefast.models import BACKBONES


@pytest.mark.parametrize("to", [None, *TARGETS])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_there_and_back_gives_the_same_model(tmp_path, backbone, to, capsys):
    model = small(backbone).eval()
    torch.save({"model_state": model.state_dict()}, tmp_path / "time.pyth")
    sizes = ["--heads", "2", "--image-size", "16", "16"]
    dest = tmp_path / ("out" if to else "out.safetensors")
    aim = ["--to", to] if to else []
    code = main([str(tmp_path / "time.pyth"), str(dest), *sizes, *aim])
    if to is not None and backbone not in TARGETS[to][0]:
        assert code == 2 and f"a {backbone}" in capsys.readouterr().err
        return
    assert code == 0
    keywords = {} if to in (None, "hf") else {"heads": 2, "image_size": 16, "frames": 4}
    again = load_model(dest, **keywords).eval()
    assert again.has_time_heads == (to in (None, "time"))
    video = clip()
    torch.testing.assert_close(again(video), model(video))


def test_folder_for_hugging_face_is_read_by_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(time_heads=False).eval()
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    arguments = ["--heads", "2", "--to", "hf"]
    assert main([str(tmp_path / "ours.safetensors"), str(tmp_path / "hf"), *arguments]) == 0
    theirs = transformers.TimesformerForVideoClassification.from_pretrained(tmp_path / "hf").eval()
    video = clip()
    with torch.no_grad():
        torch.testing.assert_close(theirs(video.transpose(1, 2)).logits, model(video))
    assert load_model(tmp_path / "hf").normalisation["mean"] == [0.5] * 3


def test_nothing_is_overwritten_and_missing_weights_need_consent(tmp_path, capsys):
    state = small().state_dict()
    del state["head.bias"]
    save_file(state, tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--heads", "2"]
    assert main(arguments) == 2
    assert "left at init: head.bias" in capsys.readouterr().err
    assert main([arguments[0], str(tmp_path / "b.pth"), *arguments[2:], "--allow-missing"]) == 2
    assert "is a .safetensors file" in capsys.readouterr().err
    assert main([*arguments, "--allow-missing"]) == 0
    assert main([*arguments, "--allow-missing"]) == 2
    assert "exists; nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dest", "to"),
    [
        ("no/a.safetensors", None), ("no/a.pth", "time"), ("/proc/a.safetensors", None),
        ("/proc/a.pth", "time"), ("/proc/a.safetensors", "time"), ("a.pth/b", "hf"),
    ],
)  # fmt: skip
def test_where_nothing_can_be_written_one_line_says_so(tmp_path, dest, to, capsys):
    save_file(small().state_dict(), tmp_path / "in.safetensors")
    (tmp_path / "a.pth").touch()
    flags = ["--heads", "2", *(["--to", to] if to else [])]
    assert main([str(tmp_path / "in.safetensors"), str(tmp_path / dest), *flags]) == 2
    error = capsys.readouterr().err
    assert "there is no folder" in error or "cannot be written" in error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth", "in.safetensors"]


def test_a_file_that_cannot_tell_the_heads_is_warned_of(tmp_path, capsys):
    save_file(small().state_dict(), tmp_path / "in.safetensors")
    flags = ["--heads", "2", "--to", "time"]
    assert main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.pth"), *flags]) == 0
    assert "2 attention heads of width 16" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", ["motionformer", "xvit"])
@pytest.mark.parametrize("side", [32, 224])
def test_a_file_that_cannot_tell_the_image_size_is_warned_of(tmp_path, capsys, backbone, side):
    model = small(backbone, image_size=side, table_size=224, heads=2)
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    flags = ["--heads", "2", "--image-size", str(side), str(side), "--to", backbone]
    assert main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.pth"), *flags]) == 0
    told = "takes them for 224 x 224 unless told otherwise (here: --image-size 32 32)"
    assert (told in capsys.readouterr().err) == (side == 32)


def test_xvit_of_the_original_project_has_other_names():
    state = small("xvit", time_heads=False).state_dict()
    foreign = to_xvit(state)
    assert "consensus.mlp_head.4.weight" in foreign and "consensus.head.weight" not in foreign
    back = from_xvit({**foreign, "new_fc.weight": torch.zeros(1)})
    assert set(back.state) == set(state) and set(back.unused) == {"new_fc.weight"}


# golden file -> what `--to` calls the family of its weights
GOLDENS = dict.fromkeys([*TIME, "time_motionformer_orthoformer_t4"], "time") | {
    name: "hf" if name.startswith("hf") else name.split("_")[1] for name in UPSTREAM
}


@pytest.mark.parametrize("name", GOLDENS)
def test_published_weights_go_there_and_back_bit_by_bit(tmp_path, name):
    golden, config = read_golden(name)
    to, state = GOLDENS[name], part(golden, "state")
    source, back = tmp_path / "theirs.pyth", tmp_path / "back.pyth"
    if to == "hf":
        source, back = tmp_path / "theirs", tmp_path / "back"
        source.mkdir()
        save_file(state, source / "model.safetensors")
        about = {
            "model_type": "timesformer", "num_attention_heads": config["num_heads"],
            "image_size": config["img"][0], "num_frames": config["num_frames"],
            "id2label": {str(i): f"name [{i}]" for i in range(config["num_classes"])},
        }  # fmt: skip
        (source / "config.json").write_text(json.dumps(about))
    else:
        published = {"epoch": 35, "model_state": state, "optimizer_state": {}, "cfg": "A: 1"}
        torch.save(published, source)
    sizes = ["--heads", str(config["num_heads"]), "--image-size", *map(str, config["img"])]
    if config["backbone"] == "xvit":
        heads = config["temporal_head"]["heads"]
        sizes += ["--set", f"head_heads={heads}", "--frames", str(config["frames"])]
    ours = tmp_path / "ours.safetensors"
    assert main([str(source), str(ours), *sizes]) == 0
    assert main([str(ours), str(back), "--to", to]) == 0
    if to == "hf":
        written = load_file(back / "model.safetensors")
        labels = json.loads((back / "config.json").read_text())["id2label"]
        assert labels["3"] == "name 3"
    else:
        written = torch.load(back, weights_only=True)["model_state"]
    assert set(written) == set(state)
    for key, value in state.items():
        assert torch.equal(written[key], value), key


@pytest.mark.parametrize("name", GOLDENS)
def test_every_published_weight_is_accounted_for_and_clips_are_normalised_as_there(name):
    golden, config = read_golden(name)
    state = part(golden, "state")
    told = {"heads": config["num_heads"], "image_size": config["img"]}
    if config["backbone"] == "xvit":
        told |= {"head_heads": config["temporal_head"]["heads"], "frames": config["frames"]}
    if "orthoformer" in name:
        told |= {"approx": "orthoformer", "landmarks": config["num_landmarks"]}
    model = load_model(state, **told)
    report = model.load_report
    assert not report.at_init and not report.unexpected
    assert len(report.loaded) + len(report.converted) + len(report.unused) == len(state)
    dead = {key.split(".")[0] for key in report.unused}
    if name.startswith("upstream_motionformer"):
        assert dead == {"patch_embed" if config["patch_temporal"] > 1 else "patch_embed_3d"}
    elif name == "upstream_xvit":
        assert dead == {"new_fc"}
    else:
        assert not dead
    wide = name.startswith(("upstream_timesformer", "hf"))
    assert model.normalisation == {
        "mean": [0.45 if wide else 0.5] * 3, "std": [0.225 if wide else 0.5] * 3,
    }  # fmt: skip
    if not name.endswith("spaceonly"):  # without a time table, any number of frames will do
        assert model.frames == layout(golden["input/video"]).shape[2]


def test_weights_that_are_never_read_do_not_disturb(tmp_path):
    golden, config = read_golden("upstream_xvit")
    torch.save(part(golden, "state"), tmp_path / "theirs.pth")
    sizes = ["--heads", "3", "--image-size", "24", "24", "--frames", "8"]
    assert main([str(tmp_path / "theirs.pth"), str(tmp_path / "a.safetensors"), *sizes]) == 0
    model = load_model(tmp_path / "a.safetensors")
    assert set(model.load_report.unused) == {"new_fc.weight", "new_fc.bias"}
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "t.pyth"), "--to", "time"]) == 0
    assert "new_fc.weight" not in torch.load(tmp_path / "t.pyth", weights_only=True)["model_state"]


def test_another_normalisation_is_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("timefast"), "propagate", True)
    monkeypatch.setattr("timefast.convert.to_console", lambda: None)
    save_file(small().state_dict(), tmp_path / "time.safetensors")
    arguments = [str(tmp_path / "time.safetensors"), str(tmp_path / "out"), "--heads", "2"]
    assert main([*arguments, "--to", "timesformer"]) == 0
    assert "mean [0.5, 0.5, 0.5]" in caplog.text and "mean 0.45" in caplog.text
    caplog.clear()
    arguments[1] += "2"
    assert main([*arguments, "--to", "time"]) == 0 and "normalised" not in caplog.text


def test_two_classifiers_need_consent_to_a_new_one():
    state = small("motionformer", time_heads=False).state_dict()
    for number in (0, 1):
        state[f"head{number}.weight"] = state["head.weight"].clone()
        state[f"head{number}.bias"] = state["head.bias"].clone()
    del state["head.weight"], state["head.bias"]
    with pytest.raises(InputError, match="left at init: head.weight, head.bias"):
        load_model(state, heads=2, image_size=16)
    model = load_model(state, heads=2, image_size=16, num_classes=7, strict=False)
    assert "verbs or nouns" in model.load_report.unused["head0.weight"]
    assert model.eval()(clip()).shape == (2, 7)


def test_xvit_and_motionformer_keep_their_tables_when_another_clip_is_asked_for(tmp_path):
    from timefast.weights import describe

    for backbone in ("xvit", "motionformer"):
        model = small(backbone, time_heads=False).eval()
        about = {"timefast": json.dumps(describe(model))}
        file = tmp_path / f"{backbone}.safetensors"
        save_file(model.state_dict(), file, metadata=about)
        video = clip(height=24, width=24)
        larger = load_model(file, image_size=24).eval()
        torch.testing.assert_close(larger(video), model(video))
        if backbone == "xvit":
            assert load_model(file, frames=2).eval()(video[:, :, :2]).shape == (2, 5)
        else:
            with pytest.raises(InputError, match="motionformer of 4 frames; no rule"):
                load_model(file, frames=2)
