"""Annotation files, right and wrong, and the choice of frames."""

import json
import logging
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timefast.data import open_videos
from timefast.data.rng import generator
from timefast.data.sampling import distinct_views, segments, train_frames, view_frames
from timefast.data.ssv2 import PUBLISHED_CLASSES
from timefast.data.subsets import PAPER
from timefast.errors import InputError

LABELS = {"Moving something up": "0", "Moving something down": "1", "Folding something": "2"}
ENTRIES = [
    {"id": "7", "label": "moving a cup up", "template": "Moving [something] up"},
    {"id": "8", "label": "folding a map", "template": "Folding [something]"},
]


def write_set(root, labels=LABELS, entries=ENTRIES, prefix="something-something-v2-"):
    (root / "videos").mkdir(exist_ok=True, parents=True)
    for name, value in (("labels", labels), ("train", entries), ("validation", entries)):
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        (root / f"{prefix}{name}.json").write_bytes(raw)
    return root


def refusal(root, split="train"):
    with pytest.raises(InputError) as caught:
        open_videos(root, split)
    return str(caught.value)


# -- layouts


@pytest.mark.parametrize("prefix", ["something-something-v2-", "", "labels/", "annotations/"])
def test_both_spellings_of_something_something_give_the_same_records(tmp_path, prefix):
    if prefix.endswith("/"):
        (tmp_path / prefix).mkdir()
    videos = open_videos(write_set(tmp_path, prefix=prefix), "train")
    assert videos.name == "ssv2" and videos.split == "train"
    assert videos.classes == ("Moving something up", "Moving something down", "Folding something")
    assert [(r.id, r.label, r.template) for r in videos.records] == [
        ("7", 0, "Moving something up"),
        ("8", 2, "Folding something"),
    ]
    assert videos.records[0].path == tmp_path / "videos" / "7.webm"


def test_byte_order_mark_and_numeric_ids_are_accepted(tmp_path):
    entries = [{**ENTRIES[0], "id": 7}]
    raw = b"\xef\xbb\xbf" + json.dumps(entries).encode()
    assert open_videos(write_set(tmp_path, entries=raw), "train").records[0].id == "7"


def test_video_folder_of_the_download_and_other_endings_are_found(tmp_path):
    write_set(tmp_path)
    (tmp_path / "videos").rename(tmp_path / "20bn-something-something-v2")
    (tmp_path / "20bn-something-something-v2" / "7.mp4").touch()
    path = open_videos(tmp_path, "train").records[0].path
    assert path == tmp_path / "20bn-something-something-v2" / "7.mp4"


def test_ending_is_that_of_the_first_video_that_is_there(tmp_path):
    write_set(tmp_path, entries=[{**ENTRIES[0], "id": "x" * 300}, *ENTRIES])
    (tmp_path / "videos/8.mp4").touch()
    assert open_videos(tmp_path, "train").records[2].path.exists()


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    one, two = (open_videos(write_set(tmp_path / k), "train").fingerprint() for k in "ab")
    assert one == two and one["videos"] == 2
    for labels, entries in ((LABELS, ENTRIES[::-1]), ({**LABELS, "Eating": "3"}, ENTRIES)):
        other = open_videos(write_set(tmp_path / "c", labels, entries), "train")
        assert other.fingerprint() != one


def test_video_folder_may_be_a_link(tmp_path):
    write_set(tmp_path / "set")
    (tmp_path / "disk").mkdir()
    (tmp_path / "set" / "videos").rmdir()
    (tmp_path / "set" / "videos").symlink_to(tmp_path / "disk")
    videos = open_videos(tmp_path / "set", "train")
    assert videos.video_root == videos.records[0].path.parent == tmp_path / "disk"


def test_published_counts_are_named_beside_what_was_found(tmp_path, caplog):
    labels = {f"Class {i}": str(i) for i in range(PUBLISHED_CLASSES)}
    entries = [{"id": "1", "template": "Class 3"}]
    with caplog.at_level(logging.INFO, "timefast"):
        open_videos(write_set(tmp_path, labels, entries), "validation")
    assert "1 validation videos (the published split has 24777)" in caplog.text


@pytest.mark.parametrize(
    "line", ["a b/7.mp4\t1", '"a b/7.mp4" 1', "a b/7.mp4,1", '"a b/7.mp4", 1', " a b/7.mp4 ,1 "]
)
def test_list_of_paths_and_labels_is_read(tmp_path, line):
    (tmp_path / "train.csv").write_text(line + "\n\nc.mp4 0\n")
    (tmp_path / "val.csv").write_text("d.mp4 2\n")
    videos = open_videos(tmp_path, "train")
    assert [(r.path, r.label) for r in videos.records] == [
        (tmp_path / "a b" / "7.mp4", 1),
        (tmp_path / "c.mp4", 0),
    ]
    assert videos.classes == open_videos(tmp_path, "validation").classes == ("0", "1", "2")


def test_list_with_wrong_lines_names_three_of_them(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 1\n" + "b.mp4\n" * 5)
    message = refusal(tmp_path)
    assert "line 2" in message and "line 4" in message and "and 2 more" in message
    (tmp_path / "train.csv").write_text("/etc/passwd 1\n../x.mp4 0\n")
    assert "lead out" in refusal(tmp_path)


def test_list_labels_must_fit_the_class_names(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 2\n")
    (tmp_path / "classes.txt").write_text("up\ndown\n")
    assert "labels outside 0..1: a.mp4 has 2" in refusal(tmp_path)


def test_folder_per_class_is_read(tmp_path):
    for name in ("walk/2.mp4", "walk/1.webm", "run/3.avi", "run/notes.txt"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    videos = open_videos(tmp_path, "train")
    assert videos.classes == ("run", "walk")
    assert [(r.id, r.label) for r in videos.records] == [
        ("run/3.avi", 0),
        ("walk/1.webm", 1),
        ("walk/2.mp4", 1),
    ]


def test_class_folders_of_the_two_splits_must_agree(tmp_path):
    for name in ("train/run/1.mp4", "train/walk/2.mp4", "val/walk/3.mp4", "train/.git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for split in ("train", "validation"):
        with pytest.raises(InputError, match="only one of them has run"):
            open_videos(tmp_path, split)
    (tmp_path / "val/run").mkdir()
    assert open_videos(tmp_path, "validation").records[0].label == 1
    assert open_videos(tmp_path, "train").classes == ("run", "walk")


# -- subsets


def test_subsets_file_wins_over_the_lists_of_the_paper(tmp_path):
    write_set(tmp_path)
    assert open_videos(tmp_path, "train").subsets == {}  # not all names of a list are there
    (tmp_path / "subsets.json").write_text(json.dumps({"static": ["Folding [something]"]}))
    assert open_videos(tmp_path, "train").subsets == {"static": (2,)}
    (tmp_path / "subsets.json").write_text(json.dumps({"static": ["Folding nothing"]}))
    assert "Folding nothing" in refusal(tmp_path)
    (tmp_path / "subsets.json").write_text(json.dumps(["Folding something"]))
    assert "expected" in refusal(tmp_path)


def test_lists_of_the_paper_become_labels(tmp_path):
    names = sorted({n for names in PAPER.values() for n in names})
    labels = {name: str(i) for i, name in enumerate(names)}
    write_set(tmp_path, labels, [{"id": "1", "template": names[0]}])
    subsets = open_videos(tmp_path, "train").subsets
    assert {k: len(v) for k, v in subsets.items()} == {
        "temporal": 6,
        "temporal18": 18,
        "static": 17,
    }
    assert set(subsets["temporal"]) < set(subsets["temporal18"])
    assert not set(subsets["static"]) & set(subsets["temporal18"])


# -- wrong files


def test_missing_folder_layout_labels_and_empty_split_each_say_so(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "holds no train split" in refusal(tmp_path)
    write_set(tmp_path)
    (tmp_path / "something-something-v2-labels.json").unlink()
    assert "something-something-v2-labels.json is missing" in refusal(tmp_path)
    write_set(tmp_path, entries=[])
    assert "the split is empty" in refusal(tmp_path)


def test_broken_json_is_located(tmp_path):
    write_set(tmp_path, entries=b'[\n {"id": "7",\n  "template": }\n]')
    assert "something-something-v2-train.json, line 3, column 15" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (json.dumps(ENTRIES).encode("utf-16"), "not UTF-8"),
        (b'{"7": "Moving something up"}', "expected [{"),
        (b"null", "null"),
        (b"[" * 100_000, "not valid JSON|nested too deeply"),
        (b'[{"id": ' + b"1" * 5000 + b', "template": "Folding something"}]', "digits"),
        (b'[{"id": "\\ud800", "template": "Folding something"}]', "surrogates"),
    ],
)
def test_split_file_of_the_wrong_kind_is_refused(tmp_path, raw, says):
    message = refusal(write_set(tmp_path, entries=raw))
    assert any(part in message for part in says.split("|"))


def entries_with(**changes):
    return [{**ENTRIES[0], "id": str(i), **changes} for i in range(5)]


@pytest.mark.parametrize(
    ("labels", "entries", "says"),
    [
        (LABELS, entries_with(template="Eating [something]"), "templates that"),
        (LABELS, entries_with(id="7"), "given twice: 7; 7; 7; and 1 more"),
        (LABELS, entries_with(template=3), "entries without"),
        (LABELS, ["7"] * 5, "entries without"),
        ({**LABELS, "Eating something": "x"}, ENTRIES, "not numbers: 'Eating something' has 'x'"),
        ({**LABELS, "Eating something": "4"}, ENTRIES, "outside 0..3: 'Eating something' has 4"),
        ({**LABELS, "Eating something": "2"}, ENTRIES, "given twice: 'Eating something'"),
        ({}, ENTRIES, "an empty object"),
        ([1], ENTRIES, "got a list"),
        ({**LABELS, "Eating something": "1" * 5000}, ENTRIES, "not numbers"),
    ],
)
def test_files_that_do_not_fit_name_the_first_three_offenders(tmp_path, labels, entries, says):
    message = refusal(write_set(tmp_path, labels, entries))
    assert says in message
    if entries is not ENTRIES and labels is LABELS and "twice" not in says:
        assert "and 2 more" in message


@pytest.mark.parametrize("id", ["../secret", "/etc/passwd", "a/../../b", "a\0b", "a\nb", "", ".."])
def test_ids_that_lead_out_of_the_folder_are_refused(tmp_path, id):
    entries = [*ENTRIES, {**ENTRIES[0], "id": id}]
    assert "not plain names" in refusal(write_set(tmp_path, entries=entries))


def test_split_name_is_checked(tmp_path):
    with pytest.raises(ValueError, match="split"):
        open_videos(tmp_path, "test")


TEXT = st.text(string.printable + "äß[]\u2028\ud7ff", min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(
        TEXT.map(lambda s: s.replace("[", "").replace("]", "")), min_size=1, unique=True
    ),
    ids=st.lists(st.integers(0, 10**9), min_size=1, max_size=20, unique=True),
    data=st.data(),
)
def test_any_well_formed_set_is_read_back(tmp_path_factory, names, ids, data):
    root = tmp_path_factory.mktemp("set")
    labels = {name: str(i) for i, name in enumerate(names)}
    chosen = [data.draw(st.sampled_from(names)) for _ in ids]
    entries = [{"id": str(i), "template": f"[{n}]"} for i, n in zip(ids, chosen, strict=True)]
    videos = open_videos(write_set(root, labels, entries), "train")
    assert videos.classes == tuple(names)
    assert [(r.id, r.label) for r in videos.records] == [
        (str(i), names.index(n)) for i, n in zip(ids, chosen, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=60), where=st.integers(0, 200), cut=st.booleans())
def test_damaged_files_give_a_message_or_a_data_set(tmp_path_factory, raw, where, cut):
    whole = json.dumps(ENTRIES).encode()
    damaged = whole[:where] + raw + (b"" if cut else whole[where:])
    root = write_set(tmp_path_factory.mktemp("set"), entries=damaged)
    try:
        assert open_videos(root, "train").records
    except InputError as error:
        assert "something-something-v2-train.json" in str(error)


# -- which frames

LENGTHS = st.integers(1, 400)
CLIPS = st.integers(1, 32)


def test_segments_follow_the_published_rule():
    # seg = 23 / 8: rounded half to even, both ends belong to a segment
    assert segments(24, 8) == [
        (0, 3),
        (3, 6),
        (6, 9),
        (9, 12),
        (12, 14),
        (14, 17),
        (17, 20),
        (20, 23),
    ]
    assert segments(21, 8)[:3] == [(0, 2), (2, 5), (5, 8)]  # 2.5 -> 2, 7.5 -> 8
    assert view_frames(24, 8) == [1, 4, 7, 10, 13, 15, 18, 21]
    assert view_frames(1, 8) == [0] * 8
    assert view_frames(3, 4) == [0, 0, 1, 2]  # fewer frames than asked for: repeated


@settings(max_examples=200, deadline=None)
@given(n=LENGTHS, frames=CLIPS, seed=st.integers(0, 99))
def test_training_frames_lie_in_their_segments_in_order(n, frames, seed):
    drawn = train_frames(n, frames, np.random.default_rng(seed))
    assert drawn == train_frames(n, frames, np.random.default_rng(seed))
    assert drawn == sorted(drawn) and len(drawn) == frames
    for frame, (start, end) in zip(drawn, segments(n, frames), strict=True):
        assert 0 <= start <= frame <= end <= n - 1


@settings(max_examples=200, deadline=None)
@given(n=LENGTHS, frames=CLIPS)
def test_only_view_takes_the_middles(n, frames):
    assert view_frames(n, frames) == [(a + b) // 2 for a, b in segments(n, frames)]


@settings(max_examples=200, deadline=None)
@given(n=LENGTHS, frames=CLIPS, views=st.integers(1, 6))
def test_views_differ_when_a_segment_has_room_and_say_when_not(n, frames, views):
    taken = [tuple(view_frames(n, frames, view, views)) for view in range(views)]
    assert all(0 <= i < n for view in taken for i in view)
    assert all(list(view) == sorted(view) for view in taken)
    assert distinct_views(n, frames, views) == len(set(taken))
    if max(end - start + 1 for start, end in segments(n, frames)) >= views:
        assert len(set(taken)) == views


def test_training_reaches_every_frame_of_a_video():
    seen = {i for seed in range(300) for i in train_frames(24, 8, np.random.default_rng(seed))}
    assert seen == set(range(24))


def test_wrong_counts_are_refused():
    for call in (
        lambda: segments(0, 8),
        lambda: segments(8, 0),
        lambda: view_frames(8, 8, view=2, views=2),
    ):
        with pytest.raises(ValueError):
            call()


def test_random_choices_depend_on_purpose_epoch_and_sample_only():
    def draw(*key):
        return generator(*key).integers(2**40)

    assert draw(0, 1, 2, "crop") == draw(0, 1, 2, "crop")
    keys = [
        (0, 1, 2, "crop"),
        (1, 1, 2, "crop"),
        (0, 2, 2, "crop"),
        (0, 1, 3, "crop"),
        (0, 1, 2, "x"),
    ]
    assert len({draw(*key) for key in keys}) == len(keys)
