"""python -m timefast.convert."""

import pytest
import torch
from safetensors.torch import save_file
from test_models import clip, small

from timefast import load_model
from timefast.convert import TARGETS, from_xvit, main, to_xvit
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
    keywords = {} if to in (None, "huggingface") else {"heads": 2, "image_size": 16, "frames": 4}
    again = load_model(dest, **keywords).eval()
    assert again.has_time_heads == (to in (None, "time"))
    video = clip()
    torch.testing.assert_close(again(video), model(video))


def test_folder_for_hugging_face_is_read_by_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(time_heads=False).eval()
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    arguments = ["--heads", "2", "--to", "huggingface"]
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


def test_xvit_of_the_original_project_has_other_names():
    state = small("xvit", time_heads=False).state_dict()
    foreign = to_xvit(state)
    assert "consensus.mlp_head.4.weight" in foreign and "consensus.head.weight" not in foreign
    back = from_xvit({**foreign, "new_fc.weight": torch.zeros(1)})
    assert set(back.state) == set(state) and set(back.unused) == {"new_fc.weight"}
