"""Own videos: a `path label` list per split, or a folder per class.

Lists: `train.csv` and `validation.csv` (or `val.csv`; also with the ending .txt, or as
`<anything>_train_split_1<anything>.txt`), one video a line, path and label apart by space, comma or
tab, a path with spaces in double quotes. Paths are relative to the data folder. Class names come
from `classes.txt`, one a line, if there is one. A third column, as in VTDL's lists `path class
frames` (and the published ones, `path frames class`), is a number of frames; it is not believed.
Folders: `train/<class>/*.mp4` and `validation/<class>/...` (or `val/`); classes in alphabetical
order.
"""

import csv
import logging
import re
from pathlib import Path
from typing import Literal

from timefast.data.annotation import (
    is_number,
    is_plain_relative,
    numbered_classes,
    read_text,
    refuse,
)
from timefast.data.batch import Record, VideoSet
from timefast.data.subsets import subset_labels
from timefast.errors import InputError

logger = logging.getLogger("timefast")

_NAMES = {"train": ("train",), "validation": ("validation", "val")}
VIDEO_SUFFIXES = {".webm", ".mp4", ".mkv", ".avi", ".mov", ".m4v"}


def find_list(root: Path, split: str) -> Path | None:
    paths = [root / f"{name}{end}" for name in _NAMES[split] for end in (".csv", ".txt")]
    for name in _NAMES[split]:
        paths += sorted(root.glob(f"*_{name}_split_[123]*.txt"))
    return next((path for path in paths if path.is_file()), None)


def find_classes(root: Path, split: str) -> Path | None:
    return next((root / name for name in _NAMES[split] if (root / name).is_dir()), None)


def load_list(root: Path, split: Literal["train", "validation"], path: Path) -> VideoSet:
    """The records of a `path label` list. Raises InputError with the first three offenders."""
    names = root / "classes.txt"
    classes: tuple[str, ...] = ()
    if names.is_file():
        classes = tuple(line.strip() for line in read_text(names).splitlines() if line.strip())
    rows = _rows(path, len(classes))
    if not rows:
        raise InputError(f"{path}: the split is empty; is it the right file?")
    if not classes:
        other = find_list(root, "validation" if split == "train" else "train")
        most = max(label for _, label in rows + (_rows(other, 0) if other else []))
        classes = numbered_classes(path, most)
    bad = [f"{p} has {label}" for p, label in rows if not 0 <= label < len(classes)]
    refuse(path, f"labels outside 0..{len(classes) - 1}", bad, f"Correct them or {names.name}.")
    first: dict[str, int] = {}
    bad = [f"{p} has {first[p]} and {y}" for p, y in rows if first.setdefault(p, y) != y]
    refuse(path, "videos listed with two labels", bad, "Remove the wrong lines.")
    records = tuple(Record(p, root / p, label, classes[label]) for p, label in rows)
    return VideoSet("list", split, root, records, classes, subset_labels(root, classes))


def load_classes(root: Path, split: Literal["train", "validation"], folder: Path) -> VideoSet:
    """The records of a folder per class; the two splits must have the same classes."""
    classes = _class_names(folder)
    other = find_classes(root, "validation" if split == "train" else "train")
    if other is not None and (apart := sorted(set(classes) ^ set(_class_names(other)))):
        raise InputError(
            f"{folder} and {other} must have the same class folders; only one of them has "
            f"{', '.join(apart[:3])}{' ...' if len(apart) > 3 else ''}. An empty folder will do"
        )
    records = tuple(
        Record(str(path.relative_to(folder)), path, label, name)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in VIDEO_SUFFIXES
    )
    if not records:
        raise InputError(
            f"{folder}: no videos in it; expected a folder per class with "
            f"{', '.join(sorted(VIDEO_SUFFIXES))} files"
        )
    return VideoSet("folders", split, root, records, classes, subset_labels(root, classes))


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in folder.iterdir() if e.is_dir() and e.name[0] != "."))


def _rows(path: Path, classes: int) -> list[tuple[str, int]]:
    """Paths and labels; of how many classes, or 0."""
    paths: list[str] = []
    numbers: list[list[int]] = []
    bad = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        unquoted = re.sub(r'"[^"]*"', "", line)  # a path in quotes may have commas
        delimiter = next((d for d in "\t," if d in unquoted), " ")
        try:
            fields = [f.strip() for f in next(csv.reader([line], delimiter=delimiter)) if f.strip()]
        except csv.Error:  # a field longer than any path
            fields = []
        if len(fields) not in (2, 3) or not all(map(is_number, fields[1:])):
            bad.append(f"line {number}: {line[:80]!r}")
        else:
            paths.append(fields[0])
            numbers.append([int(field) for field in fields[1:]])
    refuse(path, "lines that are not `path label`", bad, "Put paths with spaces in double quotes.")
    bad = [repr(p) for p in paths if not is_plain_relative(p)]
    refuse(path, "paths that could lead out of the data folder", bad, "Make them relative to it.")
    if len({len(row) for row in numbers}) > 1:
        raise InputError(f"{path}: some lines have two columns and some three")
    column = _class_column(path, list(zip(*numbers, strict=True)), classes)
    return [(p, row[column]) for p, row in zip(paths, numbers, strict=True)]


def _class_column(path: Path, columns: list[tuple[int, ...]], classes: int) -> int:
    """0 or 1: which of the columns after the path holds the class.

    A column that reaches the number of classes, or without that number one that leaves values out
    on the way up from 0, is none; if both could be, it is the first.
    """
    if len(columns) < 2:
        return 0
    could = [
        number
        for number, column in enumerate(columns)
        if (max(column) < classes if classes else len(set(column)) == max(column) + 1)
    ]
    column = could[0] if could else 0
    logger.info("%s: class in column %d, number of frames in the other", path, column + 2)
    return column
