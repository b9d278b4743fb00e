"""The demo data set: what it claims, that it can be made again, and that it is never half there."""

import hashlib
import json
from collections import Counter

import av
import numpy as np
import pytest

from timefast import demo_data
from timefast.cache import cache_folder
from timefast.data import open_videos
from timefast.demo_data import CLASSES, TEMPORAL, main, render, write_demo_data
from timefast.errors import InputError

TINY = {"train_per_class": 1, "val_per_class": 1, "workers": 1}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "set"
    return write_demo_data(folder, train_per_class=4, val_per_class=2, workers=1)


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_layout_is_that_of_something_something(demo):
    labels = json.loads((demo / "something-something-v2-labels.json").read_text())
    assert sorted(labels.values(), key=int) == [str(i) for i in range(12)]
    ids = []
    for split, per_class in (("train", 4), ("validation", 2)):
        entries = json.loads((demo / f"something-something-v2-{split}.json").read_text())
        counts = Counter(e["template"].replace("[", "").replace("]", "") for e in entries)
        assert counts == dict.fromkeys(labels, per_class)
        assert all({"id", "label", "template", "cue", "aligned"} <= e.keys() for e in entries)
        ids += [e["id"] for e in entries]
    assert sorted(f"{i}.webm" for i in ids) == sorted(p.name for p in (demo / "videos").iterdir())
    subsets = json.loads((demo / "subsets.json").read_text())
    assert len(subsets["temporal"]) == 8 and len(subsets["static"]) == 4
    assert [p.name for p in demo.parent.iterdir()] == ["set"]  # nothing is left beside it


def test_videos_are_vp9_and_show_the_rendered_frames(demo):
    train = open_videos(demo, "train")
    for record in train.records[::7]:
        with av.open(str(record.path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "vp9"
            assert stream.codec_context.pix_fmt == "yuv420p" and stream.average_rate == 12
        index = int(record.id) // len(CLASSES)
        entry = json.loads((demo / "something-something-v2-train.json").read_text())[int(record.id)]
        frames = render(0, "train", record.label, index, entry["cue"])
        shown = decoded(record.path)
        assert shown.shape == frames.shape == (24, 72, 96, 3)
        assert np.abs(shown.astype(int) - frames).mean() < 6


def test_rendering_is_a_function_of_seed_split_class_index_and_cue():
    def digest(*args):
        return hashlib.sha256(render(*args).tobytes()).hexdigest()

    first = digest(0, "train", 3, 1, 1)
    assert digest(0, "train", 3, 1, 1) == first
    others = [(1, "train", 3, 1, 1), (0, "validation", 3, 1, 1), (0, "train", 2, 1, 1),
              (0, "train", 3, 2, 1), (0, "train", 3, 1, 0)]  # fmt: skip
    assert first not in {digest(*args) for args in others}


def test_generator_did_not_change_under_its_version():
    """Rough enough for another OpenCV; a change that this sees needs a new VERSION."""
    assert demo_data.VERSION == 1
    found = [render(0, "train", label, 0, 1).mean(axis=(0, 1, 2)) for label in (0, 5, 7, 10)]
    means = [
        [147.8, 117.6, 81.8],
        [127.3, 100.1, 78.9],
        [134.8, 111.2, 87.4],
        [137.1, 115.3, 100.2],
    ]
    assert np.allclose(found, means, atol=0.5)


@pytest.mark.parametrize("even", [0, 2, 4, 6])
def test_odd_class_is_the_even_one_run_backwards(even):
    tracks = [list(demo_data._tracks(np.random.default_rng(5), even + odd)) for odd in (0, 1)]
    for forwards, backwards in zip(*tracks, strict=True):
        for a, b in zip(forwards, backwards, strict=True):
            assert np.array_equal(a, b[::-1])


def test_even_classes_move_as_their_name_says():
    rng = np.random.default_rng
    (right,), (up,), (nearer,) = (list(demo_data._tracks(rng(1), label)) for label in (0, 2, 4))
    assert right[0][-1] - right[0][0] > 30 and abs(right[1][-1] - right[1][0]) < 6
    assert up[1][-1] - up[1][0] < -24
    assert nearer[2][-1] / nearer[2][0] > 2
    left, other = demo_data._tracks(rng(1), 6)
    assert other[0][0] - left[0][0] > other[0][-1] - left[0][-1] > 0


def test_cue_agrees_in_nine_of_ten_training_and_half_of_the_validation_videos():
    for video_split, share in (("train", 0.9), ("validation", 0.5)):
        videos = [v for v in demo_data._videos(40, 20) if v.split == video_split]
        for label in range(TEMPORAL):
            mine = [v for v in videos if v.label == label]
            assert np.mean([v.cue == label % 2 for v in mine]) == share
        assert np.mean([v.cue for v in videos if v.label >= TEMPORAL]) == 0.5


def test_cue_tints_the_background():
    warm, blue = (
        render(0, "train", 8, 0, cue).astype(float).mean(axis=(0, 1, 2)) for cue in (1, 0)
    )
    assert warm[0] - warm[2] > 25 and blue[2] - blue[0] > 25


def test_number_of_processes_does_not_change_a_byte(tmp_path):
    one = write_demo_data(tmp_path / "one", **TINY)
    two = write_demo_data(tmp_path / "two", **{**TINY, "workers": 2})
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_finished_set_is_left_alone_and_an_outdated_one_is_replaced(tmp_path):
    root = write_demo_data(tmp_path / "set", **TINY)
    mark = root / "videos" / "0.webm"
    mark.write_bytes(b"touched")
    write_demo_data(root, **TINY)
    assert mark.read_bytes() == b"touched"
    write_demo_data(root, seed=1, **TINY)
    assert mark.read_bytes() != b"touched"
    assert json.loads((root / "manifest.json").read_text())["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        write_demo_data(tmp_path, **TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_data, "_make", killed)
    with pytest.raises(KeyboardInterrupt):
        write_demo_data(tmp_path / "set", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_second_process_making_the_same_set_keeps_the_first_one(tmp_path, monkeypatch):
    write = demo_data._write

    def while_another_finishes(folder, manifest, workers):
        monkeypatch.setattr(demo_data, "_write", write)
        write_demo_data(tmp_path / "set", **TINY)
        (tmp_path / "set" / "first").touch()
        write(folder, manifest, workers)

    monkeypatch.setattr(demo_data, "_write", while_another_finishes)
    root = write_demo_data(tmp_path / "set", **TINY)
    assert (root / "first").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_link_to_an_empty_folder_is_filled_and_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").symlink_to(tmp_path / "disk")
    write_demo_data(tmp_path / "set", **TINY)
    assert (tmp_path / "set").is_symlink() and (tmp_path / "disk/manifest.json").exists()


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train_per_class": 0}, {"val_per_class": -2}])
def test_sizes_that_make_no_set_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}: expected at least"):
        write_demo_data(tmp_path / "set", **{**TINY, **wrong})
    assert not (tmp_path / "set").exists()


def test_folder_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the folder you are in"):
        write_demo_data(".", **TINY)


def test_unwritable_cache_names_the_ways_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="XDG_CACHE_HOME.*--data"):
        demo_data.demo_data_folder()


def test_user_without_a_home_has_a_cache_folder(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("timefast.cache.Path.home", no_home)
    assert cache_folder().is_absolute()


def test_unwritable_target_is_one_message_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file" / "set")]) == 2
    message = capsys.readouterr().err
    assert "cannot write" in message and "Traceback" not in message


def test_command_writes_the_set(tmp_path, capsys):
    flags = ["--train-per-class", "1", "--val-per-class", "1", "--workers", "1"]
    assert main([str(tmp_path / "set"), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "set")
    assert len(open_videos(tmp_path / "set", "validation").records) == 12


def test_cached_set_lies_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(demo_data, "write_demo_data", lambda root: asked.append(root) or root)
    assert demo_data.demo_data_folder() == tmp_path / "timefast" / "demo-1-seed0"
    assert len(asked) == 1
