"""python -m timefast.export: what is written computes what the model does."""

import json
from pathlib import Path

import pytest
import torch
from test_analysis import KINDS
from test_models import clip, small

from timefast import export
from timefast.errors import InputError

onnxruntime = pytest.importorskip("onnxruntime")


def run_onnx(file: Path, video: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"video": video.numpy()})[0])


def test_the_command_writes_a_program_for_any_number_of_clips(tiny_run, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    assert export.main([str(tiny_run), str(file)]) == 0
    assert "video [clips, 3, 8, 64, 64] float32 -> logits [clips, 12]" in capsys.readouterr().out
    extra = {"timefast": ""}
    program = torch.export.load(file, extra_files=extra).module()
    for clips in (1, 3):
        assert program(torch.randn(clips, 3, 8, 64, 64)).shape == (clips, 12)
    about = json.loads(extra["timefast"])
    assert about["classes"][2] == "Lifting something up" and about["mean"] == [0.5] * 3


def test_the_command_writes_onnx_with_what_one_must_know(tiny_run, tmp_path, capsys):
    file = tmp_path / "model.onnx"
    assert export.main([str(tiny_run), str(file)]) == 0
    assert "largest difference from the model" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]  # no weights beside it
    session = onnxruntime.InferenceSession(str(file))
    assert session.get_inputs()[0].shape == ["clips", 3, 8, 64, 64]
    about = json.loads(session.get_modelmeta().custom_metadata_map["timefast"])
    assert about["frames"] == 8 and about["crop"] == 64 and len(about["classes"]) == 12


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("motionformer", "xvit") else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_onnx_gives_the_logits_of_every_backbone(kind, tmp_path):
    depth = 1 if kind in ("motionformer", "xvit") else 2
    model = small(kind.split()[0], depth=depth, impl="reference", **KINDS[kind]).eval()
    export.write_onnx(model, clip(), tmp_path / "m.onnx", "{}")
    video = clip(B=3)
    with torch.no_grad():
        torch.testing.assert_close(
            run_onnx(tmp_path / "m.onnx", video), model(video), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gives_the_logits_of_every_backbone(kind, tmp_path):
    model = small(kind.split()[0], impl="reference", **KINDS[kind]).eval()
    export.write_program(model, clip(), tmp_path / "m.pt2", "{}")
    video = clip(B=3)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load(tmp_path / "m.pt2").module()(video), model(video)
        )


def test_a_program_that_computes_something_else_is_not_kept(
    tiny_run, tmp_path, monkeypatch, capsys
):
    def wrong(model, video, dest, about):
        class Other(torch.nn.Module):
            def forward(self, video):
                return video.mean((1, 2, 3, 4))[:, None].expand(-1, 12) + 1

        export_other = torch.export.export(
            Other(), (video,), dynamic_shapes=({0: torch.export.Dim("clips")},)
        )
        torch.export.save(export_other, dest)

    monkeypatch.setitem(export.WRITERS, ".pt2", wrong)
    assert export.main([str(tiny_run), str(tmp_path / "m.pt2")]) == 1
    assert "nothing is kept" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_model_that_torch_cannot_export_gives_one_line(tiny_run, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise TypeError("no such operator\nand a page more")

    monkeypatch.setitem(export.WRITERS, ".pt2", fails)
    assert export.main([str(tiny_run), str(tmp_path / "m.pt2")]) == 1
    said = capsys.readouterr().err
    assert "(TypeError: no such operator); nothing is kept" in said and "a page more" not in said


def test_what_cannot_be_written_is_refused(tiny_run, tmp_path, monkeypatch, capsys):
    def refused(dest: Path) -> str:
        assert export.main([str(tiny_run), str(dest)]) == 2
        return capsys.readouterr().err

    assert "ends in .pt2 or .onnx" in refused(tmp_path / "model.pth")
    assert "there is no folder" in refused(tmp_path / "no" / "model.onnx")
    assert "cannot be written" in refused(Path("/proc/model.pt2"))
    (tmp_path / "model.onnx").touch()
    assert "nothing is overwritten" in refused(tmp_path / "model.onnx")
    model = small("motionformer", approx="orthoformer", landmarks=4)
    with pytest.raises(InputError, match="seeded generator"):
        export.write_onnx(model, clip(), tmp_path / "a.onnx", "{}")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert 'pip install -e ".[onnx]"' in refused(tmp_path / "b.onnx")
