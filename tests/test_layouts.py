"""Layouts of other data sets: all give the same kind of records, and refuse what does not fit."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_pipelines import SPEC, equal, moving_square, put

from timefast.data import has_split, open_videos
from timefast.demo_data import encode
from timefast.errors import InputError
from timefast.pipelines.loader import ClipLoader
from timefast.pipelines.manifest import NAME, read_manifest
from timefast.scan import scan


def fill(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def pairs(videos):
    return [(str(r.path.relative_to(videos.root)), r.label) for r in videos.records]


def refusal(root, split="train"):
    with pytest.raises(InputError) as caught:
        open_videos(root, split)
    return str(caught.value)


# -- Kinetics

HEAD = "label,youtube_id,time_start,time_end,split\n"
KINETICS = {
    "annotations/train.csv": HEAD
    + "riding a bike,abc-DEF_123,7,17,train\nabseiling,x,0,10,train\n",
    "annotations/validate.csv": HEAD + "zumba,y,12,22,validate\n",
}


@pytest.mark.parametrize(
    "place",
    ["train/riding a bike/abc-DEF_123_000007_000017.mp4", "train/abc-DEF_123_000007_000017.mp4",
     "riding a bike/abc-DEF_123.mkv", "videos/abc-DEF_123_000007_000017.webm"],
)  # fmt: skip
def test_kinetics_is_read_by_its_own_annotation(tmp_path, place):
    fill(tmp_path, {**KINETICS, place: ""})
    videos = open_videos(tmp_path, "train")
    assert videos.name == "kinetics" and videos.classes == ("abseiling", "riding a bike", "zumba")
    assert [(r.id, r.label) for r in videos.records] == [
        ("abc-DEF_123_000007_000017", 1), ("x_000000_000010", 0),
    ]  # fmt: skip
    assert videos.records[0].path == tmp_path / place
    assert open_videos(tmp_path, "validation").records[0].label == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD, "empty"),
        (HEAD + "a,b,0\n", "line 2"),
        (HEAD + "a,b,0,10,train\n\na,c,0,x,train\n", "line 4"),
        (HEAD + f"a,b,0,{'9' * 5000},train\n", "line 2"),
        (HEAD + f"a,{'b' * 200_000},0,10,train\n", "after line 1"),
        (HEAD + "a,b,0,x,train\n", "whole seconds"),
        (HEAD + "a,../../b,0,10,train\n", "lead out"),
        (HEAD + "../a,b,0,10,train\n", "lead out"),
        (HEAD + "a,b,0,10,train\nc,b,0,10,train\n", "twice"),
    ],
)
def test_kinetics_annotation_that_does_not_fit_is_refused(tmp_path, text, says):
    assert says in refusal(fill(tmp_path, {"train.csv": text}))


# -- UCF101, HMDB51


def test_ucf101_is_read_by_its_split_files(tmp_path):
    fill(tmp_path, {
        "ucfTrainTestlist/classInd.txt": "1 Archery\n2 Biking\n",
        "ucfTrainTestlist/trainlist01.txt": "Biking/v_Biking_g08_c01.avi 2\n",
        "ucfTrainTestlist/trainlist02.txt": "Archery/v_Archery_g08_c01.avi 1\n",
        "ucfTrainTestlist/testlist01.txt": "Archery/v_Archery_g01_c01.avi\n",
        "UCF-101/Biking/v_Biking_g08_c01.avi": "",
    })  # fmt: skip
    assert pairs(open_videos(tmp_path, "train")) == [("UCF-101/Biking/v_Biking_g08_c01.avi", 1)]
    videos = open_videos(tmp_path, "validation")
    assert videos.name == "ucf101" and videos.classes == ("Archery", "Biking")
    assert pairs(videos) == [("UCF-101/Archery/v_Archery_g01_c01.avi", 0)]
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").unlink()  # another split is chosen by its files
    assert open_videos(tmp_path, "train").records[0].template == "Archery"
    fill(tmp_path, {"ucfTrainTestlist/trainlist02.txt": "Diving/a.avi 3\n"})
    assert "not numbered: Diving/a.avi" in refusal(tmp_path)
    fill(tmp_path, {"ucfTrainTestlist/trainlist02.txt": "../a.avi 3\n"})
    assert "lead out" in refusal(tmp_path)
    (tmp_path / "ucfTrainTestlist/classInd.txt").unlink()
    assert "classInd.txt is missing" in refusal(tmp_path)


def test_hmdb51_is_read_by_its_split_files(tmp_path):
    fill(tmp_path, {
        "testTrainMulti_7030_splits/wave_test_split1.txt": "a!b.avi 1\nc.avi 2 \nd.avi 0\n",
        "testTrainMulti_7030_splits/brush_hair_test_split1.txt": "e.avi 1\n",
        "testTrainMulti_7030_splits/brush_hair_test_split2.txt": "e.avi 2\n",
        "hmdb51/wave/a!b.avi": "",
    })  # fmt: skip
    videos = open_videos(tmp_path, "train")
    assert videos.name == "hmdb51" and videos.classes == ("brush_hair", "wave")
    assert pairs(videos) == [("hmdb51/brush_hair/e.avi", 0), ("hmdb51/wave/a!b.avi", 1)]
    assert pairs(open_videos(tmp_path, "validation")) == [("hmdb51/wave/c.avi", 1)]
    fill(tmp_path, {"testTrainMulti_7030_splits/wave_test_split1.txt": "a.avi 3\n"})
    assert "`name 2`: a.avi 3" in refusal(tmp_path)


# -- VTDL lists


@pytest.mark.parametrize(
    ("lines", "classes", "labels"),
    [
        ("a.avi 0 77\nb.avi 1 40\nc.avi 1 11\n", None, [0, 1, 1]),  # as documented
        ("a.avi 77 0\nb.avi 40 1\nc.avi 11 1\n", None, [0, 1, 1]),  # as published
        ("a.avi 30 11\nb.avi 40 3\n", 12, [11, 3]),  # only the second fits twelve classes
        ("a.avi 0 1\nb.avi 1 0\n", None, [0, 1]),  # both could be: as documented
    ],
)
def test_lists_of_vtdl_have_the_class_in_either_column(tmp_path, lines, classes, labels):
    fill(tmp_path, {"hmdb51_train_split_1_videos.txt": lines})
    if classes:
        fill(tmp_path, {"classes.txt": "".join(f"class {i}\n" for i in range(classes))})
    assert [r.label for r in open_videos(tmp_path, "train").records] == labels


def test_list_with_two_and_three_columns_is_refused(tmp_path):
    assert "two columns and some three" in refusal(fill(tmp_path, {"train.txt": "a 0\nb 1 20\n"}))


def test_paths_in_quotes_may_have_commas(tmp_path):
    lines = '"my clips/a, b.webm" 0\r\n"c d.webm",1\r\n"e, f.webm","2"\r\n'
    records = open_videos(fill(tmp_path, {"train.csv": lines}), "train").records
    expected = [("my clips/a, b.webm", 0), ("c d.webm", 1), ("e, f.webm", 2)]
    assert [(r.id, r.label) for r in records] == expected


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("a 0\n\n\nb\n", "line 4: 'b'"),
        ("a 0\na 1\n", "with two labels: a has 0 and 1"),
        ("a 0\nb 300000000\n", "up to 100000 classes"),
        (f"a 0\nb {'9' * 5000}\n", "line 2"),
        (f"{'a' * 200_000} 0\n", "line 1"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(tmp_path, lines, says):
    assert says in refusal(fill(tmp_path, {"train.csv": lines}))


def test_folder_that_may_not_be_listed_is_wrong_input(tmp_path, monkeypatch):
    def refusing(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "train" / "run").mkdir(parents=True)
    monkeypatch.setattr(Path, "iterdir", refusing)
    assert "train: cannot be read (Permission denied)" in refusal(tmp_path)


# -- WebDataset


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        frames = moving_square(8 + number, 36, 48)
        frames[:, :8] = np.random.default_rng(number).integers(0, 200, (8, 48, 3))
        encode(frames, folder / f"{number}.webm")
    return folder


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(root, clips):
    """Two shards of three clips, and the same clips as a list of files, under `root`/files."""
    for number in range(2):
        members = {}
        for i in range(3 * number, 3 * number + 3):
            members[f"{i:03d}.webm"] = (clips / f"{i}.webm").read_bytes()
            members[f"{i:03d}.cls"] = str(i % 3).encode()
        shard(root / f"train-{number:06d}.tar", members)
    lines = ""
    for i in range(6):
        lines += f"{i}.webm {i % 3}\n"
        put(root / "files", (clips / f"{i}.webm").read_bytes(), f"{i}.webm")
    fill(root / "files", {"train.csv": lines})


def batches(root, **options):
    return list(
        ClipLoader(
            open_videos(root, "train"), SPEC, train=True, batch_size=4, pipeline="cpu", **options
        ).batches(0)
    )


def test_shards_give_the_batches_of_single_files(tmp_path, clips):
    (tmp_path / "files").mkdir()
    write_shards(tmp_path, clips)
    videos = open_videos(tmp_path, "train")
    assert videos.name == "shards" and [r.label for r in videos.records] == [0, 1, 2, 0, 1, 2]
    assert videos.records[4].id == "train-000001/004" and not has_split(tmp_path, "validation")
    assert equal(batches(tmp_path), batches(tmp_path / "files"))
    assert equal(batches(tmp_path, workers=1), batches(tmp_path / "files"))


def test_shards_are_scanned_like_files(tmp_path, clips):
    (tmp_path / "files").mkdir()
    write_shards(tmp_path, clips)
    shard(tmp_path / "train-000002.tar", {"a.webm": b"<html>", "a.cls": b"1"})
    found = scan(tmp_path, workers=1)
    assert [line["verdict"] for line in found.values()] == ["ok"] * 6 + ["not-a-video"]
    assert "train-000002.tar/a.webm" in read_manifest(tmp_path / NAME)
    (bad,) = {f for b in batches(tmp_path) for f in b.failures}
    assert bad.kind == "not-a-video" and bad.path.endswith("train-000002.tar/a.webm")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_shard_that_ends_or_breaks_between_members_is_refused(tmp_path, damage):
    path = tmp_path / "train-0.tar"
    shard(path, {"a.mp4": b"-", "a.cls": b"0", "b.mp4": b"-", "b.cls": b"1"})
    raw = bytearray(path.read_bytes())
    place = 4 * tarfile.BLOCKSIZE  # of the header of b.mp4
    raw[place] ^= 1
    path.write_bytes(raw[:place] if damage == "cut" else raw)
    assert f"at byte {place}" in refusal(tmp_path)


def test_labels_of_shards_may_be_numbers_or_names_in_json(tmp_path):
    shard(tmp_path / "train/0.tar", {
        "deep/a.mp4": b"-", "deep/a.json": json.dumps({"label": "walk"}).encode(),
        "b.mp4": b"-", "b.json": b'{"label": 0}', "README": b"not looked at", "d.cls": b"1",
    })  # fmt: skip
    assert "samples without a video: 0.tar: d." in refusal(tmp_path)
    shard(tmp_path / "train/0.tar", {
        "deep/a.mp4": b"-", "deep/a.json": json.dumps({"label": "walk"}).encode(),
        "b.mp4": b"-", "b.json": b'{"label": 0}', "c.cls": b"1\n", "c.avi": b"-",
    })  # fmt: skip
    assert "classes.txt is missing" in refusal(tmp_path)
    fill(tmp_path, {"classes.txt": "run\nwalk\n"})
    assert [(r.id, r.label) for r in open_videos(tmp_path, "train").records] == [
        ("0/deep/a", 1), ("0/b", 0), ("0/c", 1),
    ]  # fmt: skip
    fill(tmp_path, {"classes.txt": "run\n"})
    assert "none of 1 classes: 0.tar: deep/a has 'walk'; 0.tar: c has 1" in refusal(tmp_path)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "train-0.tar"
    path.write_bytes(b"\x1f\x8b" + bytes(600))
    assert "cannot be read as a tar file" in refusal(tmp_path)
    shard(path, {})
    assert "hold no samples" in refusal(tmp_path)
    shard(path, {"a.mp4": b"-", "a.cls": b"300000000"})
    assert "up to 100000 classes" in refusal(tmp_path)
    shard(path, {"a.mp4": b"-"})
    assert "samples without a label: train-0.tar: a" in refusal(tmp_path)
    shard(path, {"../a.mp4": b"-", "../a.cls": b"0"})
    assert "lead out of the tar file" in refusal(tmp_path)


def test_each_fault_of_the_table_is_held_by_a_test_that_exists():
    root = Path(__file__).parent
    page = (root.parent / "docs" / "data.md").read_text("utf-8")
    rows = [line.split("|")[3] for line in page.split("| fault |")[1].splitlines()[2:] if line]
    assert len(rows) > 20
    for row in rows:
        for part in row.replace("(gpu)", "").split(";"):
            file, _, names = part.strip().partition(":")
            if file == "the same":
                continue
            text = (root / f"{file}.py").read_text("utf-8")
            for name in filter(None, (name.strip() for name in names.split(","))):
                assert re.search(rf"^def test_\w*{name}", text, re.MULTILINE), (file, name)
