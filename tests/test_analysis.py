"""What a model knows about time: order probe, confidence gap, Grad-CAM, predictions."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_models import clip, small

from timefast import confidence, gradcam, predict, probe
from timefast.charts import model_names, save_confidence, save_probe, shown_range
from timefast.eval import __main__ as evaluate
from timefast.eval.accuracy import Predictions
from timefast.eval.tokens import frame_features, patch_tokens, watching
from timefast.weights import describe

KINDS = {
    "timesformer": {},
    "timesformer joint": {"attention": "joint"},
    "timesformer space": {"attention": "space"},
    "motionformer": {},
    "motionformer joint": {"attention": "joint"},
    "motionformer divided": {"attention": "divided"},
    "motionformer tubes": {"tube": 2},
    "xvit": {},
}


def model_of(kind):
    return small(kind.split()[0], **KINDS[kind]).eval()


# ---- tokens of blocks


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_the_last_block_are_what_the_final_norm_gets(kind):
    model, video = model_of(kind), clip()
    norm = model.base_model.norm if model.backbone == "xvit" else model.norm
    blocks, normed = [], []

    def keep(number, output):
        tokens = patch_tokens(model, output, video)
        if tokens is not None:
            (blocks, normed)[number].append(tokens)

    with watching([model.blocks[-1], norm], keep), torch.no_grad():
        model.features(video)
    frames = 2 if kind.endswith("tubes") else 4
    assert blocks[0].shape == (2, frames, 4, 32)
    torch.testing.assert_close(norm(blocks[0]), normed[-1])
    features = frame_features(model, video)
    assert features.shape == (2, 2, frames, 32)
    torch.testing.assert_close(features[-1], blocks[0].mean(2))


# ---- probe


def test_the_probe_finds_an_order_that_is_there_and_none_that_is_not():
    torch.manual_seed(0)
    place = torch.zeros(2, 200, 4, 16)
    place[0, :, range(4), range(4)] = 3.0  # block 0 knows the place, block 1 does not
    features = place + torch.randn(2, 200, 4, 16)
    classifiers = probe.fit(features[:, :150])
    (known, unknown), videos = probe.accuracy(classifiers, features[:, 150:].split(20, 1))
    assert known > 85.0 and unknown < 40.0 and videos == 50  # chance is 25


def test_the_classifiers_are_those_of_the_convex_problem():
    """The gradient of what they minimise vanishes."""
    torch.manual_seed(0)
    features = torch.randn(1, 60, 3, 5)
    features[0, :, :, 0] += torch.arange(3.0)
    found = probe.fit(features)
    x = ((features[0] - found.mean[0]) / found.std[0]).flatten(0, 1)
    weight = found.weight[0].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        x @ weight.T + found.bias[0], torch.arange(3).repeat(60)
    ) + 0.5 * probe.DECAY * weight.square().sum()  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-4


def test_probe_command_writes_numbers_and_chart(tiny_run, tmp_path, capsys):
    flags = ["--workers", "0", "--train-videos", "6", "--out", str(tmp_path)]
    assert probe.main([str(tiny_run), *flags]) == 0
    record = json.loads((tmp_path / "probe.json").read_text())["models"][0]
    assert record["train_videos"] == 6 and record["videos_evaluated"] == 12
    assert record["chance"] == 12.5 and len(record["accuracy"]) == 2
    said = capsys.readouterr()
    assert "block  2" in said.out and "6 training videos" in said.out
    assert Image.open(tmp_path / "probe.png").size == (1024, 608)
    again = tmp_path / "again"
    assert probe.main([str(tiny_run), *flags[:-1], str(again), "--batch-size", "5"]) == 0
    repeated = json.loads((again / "probe.json").read_text())["models"][0]
    assert repeated["accuracy"] == record["accuracy"]
    assert "validation videos: batch 3 of 3" in capsys.readouterr().err


# ---- confidence


def test_mass_of_the_confidence_gap_falls_where_the_gap_is():
    def sure(*values):  # two classes
        return torch.tensor([[v, 1 - v] for v in values])

    predictions = Predictions(
        sample=torch.arange(4),
        label=torch.zeros(4, dtype=torch.long),
        original=sure(0.95, 0.95, 0.55, 0.75),
        shuffled=torch.stack([sure(0.5, 0.5, 0.95, 0.75), sure(0.95, 0.5, 0.95, 0.75)]),
    )
    found = confidence.histogram(predictions)
    assert len(found["mass"]) == 20 and sum(found["mass"]) == pytest.approx(1)
    mass = dict(zip(found["edges"], found["mass"], strict=False))
    assert mass[0.4] == pytest.approx(3 / 8)  # gap 0.45: two of the four, then one
    assert mass[-0.4] == pytest.approx(2 / 8) or mass[-0.5] == pytest.approx(2 / 8)  # gap -0.4
    assert mass[0.0] == pytest.approx(3 / 8)
    assert found["mass_spread"][14] == pytest.approx(0.25 / 2**0.5)
    assert shown_range([found]) in ((-0.4, 0.5), (-0.5, 0.5))


def test_a_gap_of_one_is_in_the_last_bin():
    one_hot = torch.eye(200)[:1]
    predictions = Predictions(
        torch.arange(1), torch.zeros(1), one_hot, torch.full((1, 1, 200), 1e-9)
    )
    assert confidence.histogram(predictions)["mass"][-1] == 1.0
    assert confidence.histogram(predictions)["mass_spread"] is None


def test_confidence_command_writes_numbers_and_chart(tiny_run, tmp_path, capsys):
    flags = ["--workers", "0", "--subset", "temporal", "--out", str(tmp_path)]
    assert confidence.main([str(tiny_run), "--beside", str(tiny_run), *flags]) == 0
    record = json.loads((tmp_path / "confidence.json").read_text())
    first, second = record["models"]
    assert first["mass"] == second["mass"] and first["videos_evaluated"] == 8
    assert first["gap"] == pytest.approx(first["confidence"] - first["shuffled_confidence"])
    assert "8/8 videos, mean confidence" in capsys.readouterr().out
    assert Image.open(tmp_path / "confidence.png").size == (1024, 608)


def test_models_of_a_chart_are_told_apart(tmp_path):
    def record(*sources):
        bins = {"mass": [1.0, 0.0], "edges": [-1.0, 0.0, 1.0]}
        values = {"accuracy": [50.0], "chance": 12.5}
        return {"models": [{"source": s, **bins, **values} for s in sources]}

    assert model_names(record("runs/a", "runs/b/")) == ["a", "b"]
    assert model_names(record("x/model.pth", "y/model.pth")) == ["x/model.pth", "y/model.pth"]
    save_probe(record("a", "b"), tmp_path / "p.png")
    save_confidence(record("a", "b"), tmp_path / "c.png")


# ---- Grad-CAM


@pytest.mark.parametrize("kind", KINDS)
def test_channel_weights_are_the_slope_of_the_logit(kind):
    """Adding e to a channel at all tokens moves the logit by e * tokens * weight."""
    model, video = model_of(kind), clip(B=1)
    model, video = model.double(), video.double()
    logits, weights, cam = gradcam.grad_cam(model, video, 2, 1)
    frames = 2 if kind.endswith("tubes") else 4
    assert cam.shape == (1, frames, 2, 2) and (cam >= 0).all()
    step, channel = 1e-6, 7
    norm = model.blocks[1].norm1

    def nudged(sign):
        def hook(_module, _inputs, output):
            total, normed = output
            if patch_tokens(model, normed, video) is not None:
                normed = normed.clone()
                patch_tokens(model, normed, video)[..., channel] += sign * step
            return total, normed

        handle = norm.register_forward_hook(hook)
        with torch.no_grad():
            logit = model(video)[0, 2]
        handle.remove()
        return logit

    slope = (nudged(1) - nudged(-1)) / (2 * step)
    tokens = cam[0].numel()
    torch.testing.assert_close(
        weights[0, channel].double() * tokens, slope, rtol=1e-4, atol=1e-6
    )  # fmt: skip
    assert all(p.grad is None for p in model.parameters())


def test_gradcam_command_writes_strip_motion_and_map(tiny_run, tmp_path, capsys):
    videos = sorted((tiny_run.parent / "data" / "videos").glob("*.webm"))
    name = "Lifting [something] up"
    flags = ["--class", name, "--beside", str(tiny_run), "--out", str(tmp_path)]
    assert gradcam.main([str(tiny_run), str(videos[0]), *flags]) == 0
    stem = f"gradcam-{videos[0].stem}"
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    assert len(record["models"]) == 2 and record["picture"] == f"{stem}.png"
    found = record["models"][0]
    assert found["class"] == "Lifting something up" and found["label"] == 2
    assert len(found["map"]) == 8 and len(found["map"][0]) == len(found["map"][0][0]) == 4
    assert max(v for f in found["map"] for row in f for v in row) == 1.0
    strip = Image.open(tmp_path / f"{stem}.png")
    assert strip.size == (8 * 164 - 4, 3 * 186)
    assert Image.open(tmp_path / f"{stem}.gif").n_frames == 8
    assert "Lifting something up" in capsys.readouterr().out


def test_maps_of_tubes_stand_beside_maps_of_frames(tiny_run, tmp_path, capsys):
    video = str(next((tiny_run.parent / "data" / "videos").glob("*.webm")))

    def saved(length, tube):
        sizes = {"num_classes": 12, "frames": length, "image_size": 16, "tube": tube}
        model = small("motionformer", **sizes)
        about = {"timefast": json.dumps(describe(model))}
        save_file(model.state_dict(), tmp_path / "tubes.safetensors", metadata=about)
        beside = ["--beside", str(tmp_path / "tubes.safetensors"), "--out", str(tmp_path)]
        return gradcam.main([str(tiny_run), video, *beside])

    assert saved(8, 2) == 0
    record = json.loads(next(tmp_path.glob("gradcam-*.json")).read_text())
    assert [len(model["map"]) for model in record["models"]] == [8, 4]
    with Image.open(next(tmp_path.glob("gradcam-*.gif"))) as motion:
        assert motion.n_frames == 8 and motion.size == (3 * gradcam.FRAME, gradcam.FRAME)
    assert saved(16, 1) == 2
    assert "name one length with --frames" in capsys.readouterr().err


def test_answers_that_are_not_finite_are_refused(tiny_run, tmp_path, capsys):
    model = small(num_classes=12, image_size=16)
    model.norm.weight.data.fill_(float("nan"))
    file, video = tmp_path / "nan.safetensors", next((tiny_run.parent / "data").rglob("*.webm"))
    save_file(model.state_dict(), file, metadata={"timefast": json.dumps(describe(model))})
    out, data = ["--out", str(tmp_path)], ["--data", str(tiny_run.parent / "data")]
    assert predict.main([str(file), str(video), "--workers", "0"]) == 1
    assert gradcam.main([str(file), str(video), *out]) == 1
    assert confidence.main([str(file), *data, "--workers", "0", *out]) == 1
    assert evaluate.main([str(file), *data, "--workers", "0"]) == 1
    model.blocks[1].norm1.weight.data.fill_(float("nan"))
    save_file(model.state_dict(), file, metadata={"timefast": json.dumps(describe(model))})
    assert probe.main([str(file), *data, "--workers", "0", *out]) == 1
    said = capsys.readouterr()
    assert said.err.count("not finite") == 5 and "top-1" not in said.out


# ---- predict


def test_predictions_come_in_order_and_a_broken_video_names_itself(tiny_run, tmp_path, capsys):
    videos = [str(v) for v in sorted((tiny_run.parent / "data" / "videos").glob("*.webm"))[:2]]
    empty = tmp_path / "empty.webm"
    empty.touch()
    arguments = [str(tiny_run), videos[0], str(empty), videos[1], "--workers", "0"]
    assert predict.main([*arguments, "--top", "3"]) == 1
    said = capsys.readouterr()
    rows = [line.split("\t") for line in said.out.splitlines()]
    assert [row[0] for row in rows] == [videos[0]] * 3 + [videos[1]] * 3
    assert [row[1] for row in rows] == ["1", "2", "3"] * 2
    assert float(rows[0][2]) >= float(rows[1][2]) >= float(rows[2][2]) > 0
    assert f"not predicted: {empty}: empty, has zero bytes" in said.err
    assert predict.main([*arguments, "--json", "--batch-size", "1"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [v["video"] for v in record["videos"]] == videos
    assert len(record["videos"][0]["classes"]) == 5
    assert sum(c["probability"] for c in record["videos"][0]["classes"]) <= 1.0
    assert record["failures"][0]["kind"] == "empty"
    best = record["videos"][1]["classes"][0]
    assert (best["class"], best["probability"]) == (
        rows[3][3], pytest.approx(float(rows[3][2]), abs=1e-5),
    )  # fmt: skip


def test_a_reader_who_stops_reading_is_no_error(tiny_run):
    video = str(next((tiny_run.parent / "data" / "videos").glob("*.webm")))
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "timefast.predict", str(tiny_run), video, "--workers", "0"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and "Error" not in done.stderr


def test_a_table_on_a_terminal(tiny_run, monkeypatch, capsys):
    video = str(next((tiny_run.parent / "data" / "videos").glob("*.webm")))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert predict.main([str(tiny_run), video, "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == video and len(lines) == 6 and all(" %  " in line for line in lines[1:])


@pytest.mark.parametrize("form", ["ssv2", "turned", "text"])
def test_names_come_from_a_labels_file(tiny_run, tmp_path, form, capsys):
    names = [f"kind {chr(97 + i)}" for i in range(12)]
    if form == "ssv2":
        content = json.dumps({n: str(i) for i, n in reversed(list(enumerate(names)))})
    elif form == "turned":
        content = json.dumps({str(i): n for i, n in enumerate(names)})
    else:
        content = "\n".join(names) + "\n"
    file = tmp_path / ("labels.txt" if form == "text" else "labels.json")
    file.write_text(content)
    video = str(next((tiny_run.parent / "data" / "videos").glob("*.webm")))
    run = [str(tiny_run), video, "--workers", "0", "--json"]
    assert predict.main([*run, "--labels", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)["videos"][0]["classes"]
    assert all(c["class"] == names[c["label"]] for c in found)


@pytest.mark.parametrize(
    "content",
    ['{"a": "1", "b": "2"}', '{"a": "0", "b": "0"}', '["a", "b"]', '{"a": {"b": 1}}', '"a"', "{"],
)
def test_a_labels_file_that_numbers_no_classes_is_refused(tiny_run, tmp_path, content, capsys):
    (tmp_path / "labels.json").write_text(content)
    assert predict.main([str(tiny_run), "x", "--labels", str(tmp_path / "labels.json")]) == 2
    error = capsys.readouterr().err
    assert "with the labels from 0 on" in error or "not valid JSON" in error


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (probe, ["--train-videos", "0"], "--train-videos: expected at least 1"),
        (probe, ["--data", "/no/such/data"], "does not exist"),
        (probe, ["--out", "/dev/null/x"], "--out /dev/null/x: cannot be made"),
        (probe, ["--out", "/proc"], "--out /proc: nothing can be written there"),
        (confidence, ["--shuffles", "0"], "--shuffles: expected at least 1"),
        (confidence, ["--subset", "nope"], "neither a file nor a subset"),
        (gradcam, ["VIDEO", "--class", "12"], "has 12 classes, from 0 on"),
        (gradcam, ["VIDEO", "--class", "Lifting up"], "near it: 'Lifting something up'"),
        (gradcam, ["VIDEO", "--class", "²"], "nor a number from 0 to 11"),
        (gradcam, ["VIDEO", "--block", "3"], "has blocks 1 to 2"),
        (gradcam, ["/no/such.webm"], "missing, there is no such file"),
        (gradcam, [__file__], "not-a-video"),
        (predict, ["VIDEO", "--labels", "/no/such.json"], "cannot be read"),
        (predict, ["VIDEO", "--labels", __file__], "names, the model has 12 classes"),
        (predict, ["VIDEO", "--top", "0"], "--top: expected at least 1"),
        (predict, ["VIDEO", "--heads", "3"], "heads=2, not 3"),
        (predict, ["VIDEO", "--frames", "0"], "frames: expected a number from 1 on"),
        (predict, ["VIDEO", "--set", "impl=auto"], "has its own place on the command line"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_wrong_input_ends_with_2_and_one_message(tiny_run, tmp_path, command, flags, said, capsys):
    video = str(next((tiny_run.parent / "data" / "videos").glob("*.webm")))
    flags = [video if flag == "VIDEO" else flag for flag in flags]
    out = [] if command is predict or "--out" in flags else ["--out", str(tmp_path)]
    assert command.main([str(tiny_run), *flags, *out]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
