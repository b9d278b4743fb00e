"""Kinetics by its official annotation: `train.csv` and `validate.csv` (or `validation.csv`,
`val.csv`), also in a folder `annotations`, with a header line that begins
`label,youtube_id,time_start,time_end`.

A video is `<youtube_id>_<start>_<end>.mp4` with times of six digits, or `<youtube_id>.mp4`, in a
folder of its class, of its split, or both, as the usual downloads leave them. Classes are numbered
in alphabetical order over all splits that are there.
"""

import csv
import logging
import os
from pathlib import Path
from typing import Literal

from timefast.data.annotation import is_number, is_plain_relative, read_text, refuse
from timefast.data.batch import Record, VideoSet
from timefast.data.subsets import subset_labels
from timefast.errors import InputError

logger = logging.getLogger("timefast")

_NAMES = {"train": ("train",), "validation": ("validate", "validation", "val")}
_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_SUFFIXES = (".mp4", ".mkv", ".webm")


def find(root: Path, split: str) -> Path | None:
    """The annotation of a split, told from a plain list by its header line."""
    for folder in (root, root / "annotations"):
        for name in _NAMES[split]:
            path = folder / f"{name}.csv"
            if path.is_file() and "youtube_id" in _first_line(path):
                return path
    return None


def load(root: Path, split: Literal["train", "validation"], path: Path) -> VideoSet:
    """The records of a split; a video that was not downloaded is a record too, and will be counted
    as missing. Raises InputError with the first three offenders."""
    rows = _rows(path)
    other = find(root, "validation" if split == "train" else "train")
    names = {row["label"] for row in rows} | {r["label"] for r in (_rows(other) if other else [])}
    classes = tuple(sorted(names))
    label_of = {name: label for label, name in enumerate(classes)}
    place = _Place(root, split)
    records = tuple(
        Record(_id(row), place.of(row), label_of[row["label"]], row["label"]) for row in rows
    )
    logger.info(
        "%s: %d %s videos of %d classes, %d of them in %s",
        path, len(records), split, len(classes), place.present, root,
    )  # fmt: skip
    return VideoSet("kinetics", split, root, records, classes, subset_labels(root, classes))


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline(4096)
    except OSError:
        return ""


def _rows(path: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(read_text(path).splitlines())
    try:
        numbered = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(
            f"{path}, after line {reader.line_num}: {error}; a quotation mark may be missing"
        ) from error
    rows = [row for _, row in numbered]
    if not rows:
        raise InputError(f"{path}: the split is empty; is it the right file?")
    bad = [
        f"line {number}"
        for number, row in numbered
        if not all(row.get(name) for name in _COLUMNS)
        or not is_number(row["time_start"])
        or not is_number(row["time_end"])
    ]
    refuse(path, f"lines without {', '.join(_COLUMNS)}", bad, "Times are whole seconds.")
    bad = [
        repr(name)
        for row in rows
        for name in (row["label"], row["youtube_id"])
        if not is_plain_relative(name) or "/" in name
    ]
    refuse(path, "names that could lead out of the data folder", bad, "Nothing was read.")
    seen: set[str] = set()
    bad = [id for id in map(_id, rows) if id in seen or seen.add(id)]  # type: ignore[func-returns-value]
    refuse(path, "clips that are listed twice", bad, "Remove the second ones.")
    return rows


def _id(row: dict[str, str]) -> str:
    return f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"


class _Place:
    """Where videos lie: the place of the last one that was found is tried first for the next."""

    def __init__(self, root: Path, split: str):
        tops = [root / name for name in (*_NAMES[split], ".", "videos") if (root / name).is_dir()]
        self._patterns = [
            (top, by_class, by_time, suffix)
            for top in tops
            for by_class in (True, False)
            for by_time in (True, False)
            for suffix in _SUFFIXES
        ]
        self.present = 0

    def of(self, row: dict[str, str]) -> Path:
        for number, pattern in enumerate(self._patterns):
            path = self._path(row, *pattern)
            if os.path.exists(path):
                self._patterns.insert(0, self._patterns.pop(number))
                self.present += 1
                return path
        return self._path(row, *self._patterns[0])

    @staticmethod
    def _path(row: dict[str, str], top: Path, by_class: bool, by_time: bool, suffix: str) -> Path:
        name = _id(row) if by_time else row["youtube_id"]
        return (top / row["label"] if by_class else top) / f"{name}{suffix}"
