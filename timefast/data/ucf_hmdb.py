"""UCF101 and HMDB51 by their official split files.

UCF101: `trainlist01.txt` and `testlist01.txt` with `classInd.txt`, in the data folder or in
`ucfTrainTestlist`; videos `<class>/<name>.avi` in `UCF-101`, `videos` or the data folder itself.
HMDB51: `<class>_test_split1.txt` with lines `<name>.avi 1` (1: training, 2: test, 0: neither), in
the data folder, `testTrainMulti_7030_splits`, `test_train_splits` or `splits`; videos
`<class>/<name>.avi` in `hmdb51`, `hmdb51_org`, `videos` or the data folder itself.

There are three splits. The first whose files are there is taken: for another leave only its files.
The test half is the validation split.
"""

import re
from pathlib import Path
from typing import Literal

from timefast.data.annotation import is_plain_relative, read_text, refuse
from timefast.data.batch import Record, VideoSet
from timefast.data.subsets import subset_labels
from timefast.errors import InputError

Split = Literal["train", "validation"]
_UCF_FOLDERS = (".", "ucfTrainTestlist", "splits")
_UCF_VIDEOS = ("UCF-101", "UCF101", "videos", ".")
_HMDB_FOLDERS = (".", "testTrainMulti_7030_splits", "test_train_splits", "splits")
_HMDB_VIDEOS = ("hmdb51", "hmdb51_org", "videos", ".")
_HMDB_MARK = {"train": "1", "validation": "2"}


def find_ucf(root: Path, split: str) -> Path | None:
    name = {"train": "trainlist", "validation": "testlist"}[split]
    for folder in _UCF_FOLDERS:
        for number in (1, 2, 3):
            path = root / folder / f"{name}0{number}.txt"
            if path.is_file():
                return path
    return None


def load_ucf(root: Path, split: Split, path: Path) -> VideoSet:
    """The records of a split. Raises InputError with the first three offenders."""
    index = path.with_name("classInd.txt")
    if not index.is_file():
        raise InputError(f"{index} is missing: {path.name} needs it to number its classes")
    lines = [line.split() for line in read_text(index).splitlines() if line.strip()]
    bad = [" ".join(f) for f in lines if len(f) != 2 or not f[0].isdecimal()]
    refuse(index, "lines that are not `number class`", bad, "Numbers begin with 1.")
    classes = tuple(name for _, name in sorted((int(number), name) for number, name in lines))
    names = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    return _video_set("ucf101", root, split, path, names, classes, _UCF_VIDEOS)


def find_hmdb(root: Path, split: str) -> Path | None:
    for folder in _HMDB_FOLDERS:
        for number in (1, 2, 3):
            first = next((root / folder).glob(f"*_test_split{number}.txt"), None)
            if first is not None:
                return first
    return None


def load_hmdb(root: Path, split: Split, path: Path) -> VideoSet:
    """The records of a split, from the files of all classes that stand beside `path`."""
    ending = re.sub(r".*(_test_split\d\.txt)", r"\1", path.name)
    files = sorted(path.parent.glob(f"*{ending}"))
    classes = tuple(file.name.removesuffix(ending) for file in files)
    names = []
    for file, name in zip(files, classes, strict=True):
        lines = [line.split() for line in read_text(file).splitlines() if line.strip()]
        bad = [" ".join(f)[:80] for f in lines if len(f) != 2 or f[1] not in ("0", "1", "2")]
        refuse(file, "lines that are not `name 0`, `name 1` or `name 2`", bad, "Correct them.")
        names += [f"{name}/{video}" for video, mark in lines if mark == _HMDB_MARK[split]]
    return _video_set("hmdb51", root, split, path.parent, names, classes, _HMDB_VIDEOS)


def _video_set(
    data: str,
    root: Path,
    split: Split,
    path: Path,
    names: list[str],
    classes: tuple[str, ...],
    folders: tuple[str, ...],
) -> VideoSet:
    if not names:
        raise InputError(f"{path}: the {split} split is empty; is it the right file?")
    bad = [repr(name) for name in names if not is_plain_relative(name)]
    refuse(path, "paths that could lead out of the data folder", bad, "Nothing was read.")
    label_of = {name: label for label, name in enumerate(classes)}
    bad = [name for name in names if name.partition("/")[0] not in label_of]
    refuse(path, "videos of classes that are not numbered", bad, "Use files that fit.")
    videos = next(f for n in folders if (f := root / n).is_dir()).resolve()
    records = tuple(
        Record(name, videos / name, label_of[cls], cls)
        for name in names
        for cls in [name.partition("/")[0]]
    )
    subsets = subset_labels(root, classes)
    return VideoSet(data, split, root, records, classes, subsets, video_root=videos)
