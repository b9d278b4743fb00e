"""Evaluation: what is counted, what is averaged, what is refused."""

import json
import logging
import shutil

import pytest
import torch

from timefast.data.batch import Batch, Failure, Record, VideoSet
from timefast.device import pick_device
from timefast.errors import InputError
from timefast.eval.__main__ import main
from timefast.eval.accuracy import Predictions, predict, protocol, summarise


class FirstFrame(torch.nn.Module):
    """Class = rounded mean of the first frame: knows nothing of later frames."""

    num_classes = 4

    def forward(self, video):
        label = video[:, :, 0].mean((1, 2, 3)).round().long()
        return 5.0 * torch.nn.functional.one_hot(label, 4).float()


def batch(rows, views=1, failures=()):
    """Rows of frame values; each frame constant."""
    video = torch.tensor(rows).float()[:, None, :, None, None].expand(-1, 3, -1, 2, 2)
    sample = torch.arange(len(rows)) // views
    label = torch.tensor([int(r[0]) for r in rows])
    return Batch(video, label, sample, torch.arange(len(rows)) % views, failures=list(failures))


def video_set(tmp_path, labels):
    records = tuple(Record(str(i), tmp_path / str(i), y, str(y)) for i, y in enumerate(labels))
    return VideoSet("synthetic", "validation", tmp_path, records, ("a", "b", "c", "d"))


def test_shuffled_frames_fool_a_model_of_the_first_frame(tmp_path):
    rows = [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]] * 20
    predictions = predict(FirstFrame(), [batch(rows)], views=1, draws=3)
    result = summarise(predictions, video_set(tmp_path, [r[0] for r in rows]))
    assert result["top1"] == 100.0
    assert 10 < result["shuffled_top1"] < 45
    assert result["gap"] == 100.0 - result["shuffled_top1"]
    assert result["shuffled_top1_spread"] > 0


def test_frame_orders_do_not_depend_on_batches():
    rows = [[i % 4, 1, 2, 3] for i in range(8)]
    whole = predict(FirstFrame(), [batch(rows)], views=1, draws=2)
    first, second = batch(rows[:3]), batch(rows[3:])
    second.sample = second.sample + 3
    parts = predict(FirstFrame(), [first, second], views=1, draws=2)
    assert torch.equal(whole.shuffled, parts.shuffled)
    other = predict(FirstFrame(), [batch(rows)], views=1, draws=2, seed=1)
    assert not torch.equal(whole.shuffled, other.shuffled)


def test_frames_backwards_and_alone_share_the_path_of_shuffled_ones(tmp_path):
    rows = [[0, 1, 2, 3], [1, 2, 3, 0], [2, 2, 2, 2]]
    predictions = predict(FirstFrame(), [batch(rows)], views=1, reverse=True, still=True)
    assert predictions.reversed.argmax(1).tolist() == [3, 0, 2]  # the last frame comes first
    assert predictions.still.argmax(1).tolist() == [1, 2, 2]  # the middle frame is all there is
    result = summarise(predictions, video_set(tmp_path, [0, 1, 2]))
    assert result["reversed_top1"] == pytest.approx(100 / 3)
    assert result["still_top1"] == pytest.approx(100 / 3)
    plain = predict(FirstFrame(), [batch(rows)], views=1)
    assert plain.reversed is None and plain.still is None


def test_shuffled_top5_counts_as_top5_does(tmp_path):
    probabilities = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.06, 0.04]])
    predictions = Predictions(
        sample=torch.arange(1),
        label=torch.tensor([4]),
        original=probabilities,
        shuffled=torch.stack([probabilities, probabilities.flip(1)]),
    )
    records = (Record("0", tmp_path / "0", 4, "e"),)
    videos = VideoSet("synthetic", "validation", tmp_path, records, tuple("abcdef"))
    result = summarise(predictions, videos)
    assert (result["top1"], result["top5"]) == (0.0, 100.0)
    assert (result["shuffled_top1"], result["shuffled_top5"]) == (0.0, 100.0)
    predictions.label[0] = 5  # last in the first order, first in the second
    result = summarise(predictions, videos)
    assert (result["shuffled_top1"], result["shuffled_top5"]) == (50.0, 50.0)


def test_views_of_a_video_are_averaged_as_named():
    class Fixed(torch.nn.Module):
        num_classes = 2

        def forward(self, video):
            return torch.tensor([[4.0, 0.0], [0.0, 2.0]])

    two_views = batch([[0, 0], [0, 0]], views=2)
    logits = predict(Fixed(), [two_views], views=2).original
    assert torch.allclose(logits, torch.tensor([[2.0, 1.0]]).softmax(-1))
    softmax = predict(Fixed(), [two_views], views=2, average="softmax").original
    mean = torch.tensor([[4.0, 0.0], [0.0, 2.0]]).softmax(-1).mean(0, keepdim=True)
    assert torch.allclose(softmax, mean)


def test_evaluation_leaves_the_training_mode_as_it_was():
    model = FirstFrame().train()
    predict(model, [batch([[0, 1]])], views=1)
    assert model.training


def test_missing_videos_are_counted_never_replaced(tmp_path):
    lost = Failure("1", "1.webm", "empty", "0 bytes")
    predictions = predict(FirstFrame(), [batch([[0, 1]], failures=[lost])], views=1)
    result = summarise(predictions, video_set(tmp_path, [0, 1]))
    assert (result["videos_expected"], result["videos_evaluated"]) == (2, 1)
    assert (result["videos_failed"], result["top1"]) == (1, 100.0)
    assert predictions.failures == (lost,)


def test_a_subset_looks_at_its_classes_alone(tmp_path):
    predictions = Predictions(
        sample=torch.arange(4),
        label=torch.tensor([0, 0, 1, 1]),
        original=torch.eye(4)[[0, 0, 0, 0]],
        shuffled=torch.zeros(0, 4, 4),
    )
    videos = video_set(tmp_path, [0, 0, 1, 1])
    assert summarise(predictions, videos, (0,))["top1"] == 100.0
    assert summarise(predictions, videos, (1,))["top1"] == 0.0
    assert summarise(predictions, videos)["top1"] == 50.0
    assert summarise(predictions, videos, (3,))["top1"] is None


def test_only_the_published_test_protocol_is_called_paper():
    assert protocol(8, (1, 3), 224, 224, "logits").startswith("paper")
    assert protocol(8, (1, 1), 224, 224, "logits").startswith("clip")
    assert protocol(8, (1, 3), 224, 224, "softmax").startswith("clip")


@pytest.fixture
def run(tiny_run):
    return tiny_run


def test_the_command_states_protocol_and_counts(run, tmp_path, capsys):
    out = tmp_path / "result.json"
    flags = ["--shuffled", "--reversed", "--single-frame", "--views", "2x3", "--workers", "0"]
    assert main([str(run), "--json", str(out), *flags]) == 0
    text = capsys.readouterr().out
    assert "2 temporal views x 3 crops of 64 px" in text and "logits averaged" in text
    assert "12/12" in text
    result = json.loads(out.read_text())
    assert set(result["results"]) == {"all", "temporal", "static"}
    for key in ("shuffled_top1", "shuffled_top5", "reversed_top1", "still_top1"):
        assert result["results"]["all"][key] is not None
    assert len(result["weights_sha256"]) == len(result["videos"]["sha256"]) == 64
    assert result["family"] == "timefast" and result["versions"]["torch"]


def test_the_number_does_not_depend_on_batch_size_or_workers(run, tmp_path):
    results = []
    for i, flags in enumerate((["--batch-size", "1", "--workers", "1"], ["--batch-size", "12"])):
        out = tmp_path / f"{i}.json"
        assert main([str(run), "--shuffled", "--json", str(out), *flags]) == 0
        results.append(json.loads(out.read_text())["results"]["all"])
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, abs=1e-4)


def test_a_subset_may_be_named_or_listed_in_a_file(run, tmp_path, capsys):
    assert main([str(run), "--subset", "static", "--workers", "0"]) == 0
    assert "4/4" in capsys.readouterr().out
    names = tmp_path / "names.txt"
    names.write_text("Lifting something up\nShowing something red\n")
    assert main([str(run), "--subset", str(names), "--workers", "0"]) == 0
    assert "2/2" in capsys.readouterr().out
    names.write_text("Juggling something\n")
    assert main([str(run), "--subset", str(names), "--workers", "0"]) == 2
    assert "Juggling something" in capsys.readouterr().err
    assert main([str(run), "--subset", "nope"]) == 2


def test_another_clip_is_made_when_asked_and_tables_follow(run, capsys):
    flags = ["--frames", "4", "--image-size", "32", "32", "--workers", "0"]
    assert main([str(run), *flags]) == 0
    assert "clip: 4 frames x 1 temporal views x 1 crops of 32 px" in capsys.readouterr().out
    assert main([str(run), "--set", "dim=64"]) == 2
    assert "holds a timesformer with dim=32, not 64" in capsys.readouterr().err
    assert main([str(run), "--set", "dim"]) == 2 and main([str(run), "--set", "dimm=3"]) == 2


def test_a_checkpoint_knows_its_run_from_whatever_folder_one_stands_in(run, monkeypatch, capsys):
    monkeypatch.chdir(run / "checkpoints")
    assert main(["step-1", "--workers", "0"]) == 0
    assert main(["step-1/model.safetensors", "--workers", "0"]) == 0
    assert capsys.readouterr().out.count("12/12") == 2


def test_another_number_of_classes_is_refused_with_both_numbers(run, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / "validation" / name).mkdir(parents=True)
        (tmp_path / "validation" / name / "clip.webm").touch()
    assert main([str(run), "--data", str(tmp_path), "--workers", "0"]) == 2
    message = capsys.readouterr().err
    assert "has 2 classes, the model of" in message and "has 12; evaluate on the data" in message


def test_classes_in_another_order_are_refused(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    swapped = tmp_path / "data"
    shutil.copytree(config["config"]["data"]["root"], swapped)
    file = swapped / "something-something-v2-labels.json"
    labels = json.loads(file.read_text())
    one, two = list(labels)[2:4]
    labels[one], labels[two] = labels[two], labels[one]
    file.write_text(json.dumps(labels))
    assert main([str(run), "--data", str(swapped), "--workers", "0"]) == 2
    message = capsys.readouterr().err
    assert one in message and two in message


def test_views_that_coincide_are_said(run, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("timefast"), "propagate", True)
    monkeypatch.setattr("timefast.eval.__main__.to_console", lambda: None)
    assert main([str(run), "--views", "30x1", "--subset", "static", "--workers", "0"]) == 0
    assert "views-collapsed: 4 videos" in caplog.text


def test_answers_that_are_not_finite_leave_no_confidence(tmp_path):
    predictions = Predictions(
        sample=torch.arange(1),
        label=torch.tensor([0]),
        original=torch.full((1, 4), float("nan")),
        shuffled=torch.zeros(0, 1, 4),
    )
    assert summarise(predictions, video_set(tmp_path, [0]))["confidence"] is None


def test_no_headline_number_when_videos_are_missing(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    broken = tmp_path / "data"
    shutil.copytree(config["config"]["data"]["root"], broken)
    entries = json.loads((broken / "something-something-v2-validation.json").read_text())
    (broken / "videos" / f"{entries[0]['id']}.webm").write_bytes(b"")
    assert main([str(run), "--data", str(broken), "--workers", "0"]) == 2
    said = capsys.readouterr()
    assert "1 of 12 videos" in said.err and "top-1" not in said.out
    more = ["--shuffled", "--reversed", "--single-frame"]
    assert main([str(run), "--data", str(broken), "--workers", "0", "--allow-missing", *more]) == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if "11/12" in x)
    numbers = row.replace(" ±", "±").split()[2:]
    assert len(numbers) == 9 and all(number.endswith("*") for number in numbers)


@pytest.mark.parametrize(
    "flags",
    [
        ["/no/such/run"], ["--views", "2y3"], ["--views", "1x2"], ["--views", "²x1"],
        ["--json", "/no/such/x.json"],
        ["--shuffles", "0"], ["--seed", "-1"], ["--batch-size", "0"], ["--workers", "-1"],
        ["--impl", "quick"], ["--device", "meta"], ["--subset", __file__],
    ],
    ids=str,
)  # fmt: skip
def test_wrong_input_ends_with_2(run, flags, capsys):
    source = [] if flags[0].startswith("/") else [str(run)]
    try:
        code = main([*source, *flags])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpu", "mps"])
def test_a_device_that_cannot_be_used_is_told_which_can(name):
    with pytest.raises(InputError, match=f"^--device {name}: expected auto, cpu, cuda or cuda:<"):
        pick_device(name)
