"""`timefast.scan`: every file gets a verdict, and no file is looked at twice for nothing."""

import json
import os
import time

import numpy as np
import pytest

from timefast import scan as scan_module
from timefast.data.batch import ClipSpec, Record, VideoSet
from timefast.demo_data import encode, write_demo_data
from timefast.errors import InputError
from timefast.pipelines import cpu_decode
from timefast.pipelines.cpu_decode import VideoError, probe
from timefast.pipelines.loader import ClipLoader
from timefast.pipelines.manifest import NAME, read_manifest
from timefast.scan import main, scan, table


@pytest.fixture
def folder(tmp_path):
    """Two good files, one cut in half, one empty, one that is text, in two folders."""
    (tmp_path / "b").mkdir()
    rng = np.random.default_rng(0)
    for name in ("1.webm", "2.webm"):
        encode(rng.integers(0, 256, (12, 32, 48, 3), dtype=np.uint8), tmp_path / name)
    raw = (tmp_path / "1.webm").read_bytes()
    (tmp_path / "b" / "cut.webm").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "b" / "empty.mp4").touch()
    (tmp_path / "b" / "page.webm").write_text("<html>")
    (tmp_path / "notes.txt").write_text("not looked at")
    return tmp_path


VERDICTS = {
    "1.webm": "ok",
    "2.webm": "ok",
    "b/cut.webm": "short",
    "b/empty.mp4": "empty",
    "b/page.webm": "not-a-video",
}


def verdicts(found):
    return {path: line["verdict"] for path, line in found.items()}


def count_looks(monkeypatch):
    looked = []

    def counting(path, *args, deep):
        looked.append(path.name)
        return probe(path, *args, deep=deep)

    monkeypatch.setattr(scan_module, "probe", counting)
    return looked


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("deep", [False, True])
def test_every_file_gets_its_verdict(folder, deep, workers):
    found = scan(folder, deep=deep, workers=workers)
    assert verdicts(found) == VERDICTS
    line = found["1.webm"]
    assert (line["codec"], line["pixel_format"]) == ("vp9", "yuv420p")
    assert (line["height"], line["width"], line["frames"], line["rotation"]) == (32, 48, 12, 0)
    assert line["size"] == (folder / "1.webm").stat().st_size and line["duration"] == 1.0
    assert found == read_manifest(folder / NAME)


def test_only_deep_scans_see_damage_after_the_first_frame(folder):
    raw = bytearray((folder / "2.webm").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 400] = b"\xff" * 400
    (folder / "2.webm").write_bytes(raw)
    fast, deep = (scan(folder, deep=deep, workers=1)["2.webm"] for deep in (False, True))
    assert deep["verdict"] in ("corrupt", "short")
    assert fast["verdict"] in ("ok", deep["verdict"])


def test_second_scan_looks_at_new_and_changed_files_only(folder, monkeypatch):
    scan(folder, workers=1)
    looked = count_looks(monkeypatch)
    assert verdicts(scan(folder, workers=1)) == VERDICTS
    assert looked == []
    (folder / "b" / "page.webm").write_bytes((folder / "2.webm").read_bytes())
    (folder / "2.webm").unlink()
    assert verdicts(scan(folder, workers=1))["b/page.webm"] == "ok"
    assert looked == ["page.webm"]
    assert "2.webm" not in read_manifest(folder / NAME)
    scan(folder, deep=True, workers=1)
    assert len(looked) == 5  # all four, since none was decoded to its end before


def test_what_was_mended_without_a_change_of_the_file_is_seen(tmp_path_factory, folder):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "3.webm"
    elsewhere.write_bytes((folder / "1.webm").read_bytes())
    (folder / "3.webm").symlink_to(elsewhere)
    assert scan(folder, workers=1)["3.webm"]["verdict"] == "outside-root"
    moved = folder / "b" / "moved.mkv"
    elsewhere.rename(moved)  # size and time stay
    (folder / "3.webm").unlink()
    (folder / "3.webm").symlink_to(moved)
    batch = next(ClipLoader(
        open_folder(folder, "3.webm"), ClipSpec(frames=2, crop=16, short_side=(32, 32)), train=True,
        batch_size=1, pipeline="cpu",
    ).batches(0))  # fmt: skip
    assert not batch.failures
    (folder / NAME).write_text((folder / NAME).read_text().replace('"by": "training"', '"x": 0'))
    assert scan(folder, workers=1)["3.webm"]["verdict"] == "ok"


def open_folder(root, *names):
    records = tuple(Record(name, root / name, 0, "a") for name in names)
    return VideoSet("list", "train", root, records, ("a",))


def test_folders_that_cannot_be_listed_are_named(folder, monkeypatch, caplog):
    listed = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with caplog.at_level("WARNING", "timefast"):
        assert set(scan(folder, workers=1)) == {"1.webm", "2.webm"}
    assert f"{folder}/b: Permission denied" in caplog.text


def test_manifest_that_cannot_be_read_is_wrong_input(folder, capsys):
    (folder / NAME).mkdir()
    assert main([str(folder)]) == 2
    assert f"{NAME}: cannot be read" in capsys.readouterr().err


def test_names_that_are_no_text_are_printed(folder):
    (folder / os.fsdecode(b"\xff.webm")).touch()
    assert "\\udcff.webm: empty" in table(scan(folder, workers=1))


def test_interrupted_scan_goes_on_where_it_stopped(folder, monkeypatch):
    def killed(path, *args, deep):
        if path.name == "cut.webm":
            raise KeyboardInterrupt
        return probe(path, *args, deep=deep)

    monkeypatch.setattr(scan_module, "probe", killed)
    assert main([str(folder), "--workers", "1"]) == 130
    with (folder / NAME).open("a") as file:
        file.write('{"path": "1.webm", "size": "large"}\n{"path": "half a li')
    looked = count_looks(monkeypatch)
    assert verdicts(scan(folder, workers=1)) == VERDICTS
    assert looked == ["cut.webm", "empty.mp4", "page.webm"]


def test_data_set_is_scanned_by_its_annotation(tmp_path):
    root = write_demo_data(tmp_path / "set", train_per_class=1, val_per_class=1, workers=1)
    (root / "videos" / "3.webm").unlink()
    (root / "videos" / "unlisted.webm").write_text("nobody asks for this file")
    found = scan(root, workers=1)
    assert len(found) == 24
    assert [path for path, line in found.items() if line["verdict"] != "ok"] == ["videos/3.webm"]
    assert found["videos/3.webm"]["verdict"] == "missing"


def test_command_says_what_is_bad_and_how_many(folder, capsys):
    assert main([str(folder), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "2  ok" in out and "b/page.webm: not-a-video" in out
    for name in ("empty.mp4", "page.webm"):
        (folder / "b" / name).unlink()
    assert main([str(folder), "--workers", "1"]) == 0  # a short file can be used


def test_wrong_input_is_one_message(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    (tmp_path / "a.webm").touch()
    assert main([str(tmp_path), "--manifest", str(tmp_path / "no" / "such" / "folder.jsonl")]) == 2
    assert "--manifest" in capsys.readouterr().err


def test_broken_annotation_is_not_passed_over(tmp_path):
    (tmp_path / "train.json").write_text("[")
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(InputError, match=r"labels\.json"):
        scan(tmp_path)


def test_manifest_lines_are_json_with_relative_paths(folder):
    scan(folder, workers=1)
    lines = [json.loads(line) for line in (folder / NAME).read_text().splitlines()]
    assert [line["path"] for line in lines] == list(VERDICTS)


def test_probe_refuses_what_decoding_refuses(folder):
    with pytest.raises(VideoError, match="zero bytes"):
        probe(folder / "b" / "empty.mp4", folder, deep=False)


def test_scan_does_not_wait_for_a_decoder_that_hangs_or_dies(folder, monkeypatch):
    def stuck(path, *args, deep):
        if path.name == "2.webm":
            time.sleep(60)
        if path.name == "cut.webm":
            os._exit(139)
        return probe(path, *args, deep=deep)

    monkeypatch.setattr(scan_module, "probe", stuck)
    monkeypatch.setattr(cpu_decode, "TIMEOUT_S", 0.5)
    before = time.monotonic()
    found = scan(folder, workers=2)
    assert time.monotonic() - before < 20
    assert verdicts(found) == {**VERDICTS, "2.webm": "timeout", "b/cut.webm": "crash"}
