"""Something-Something v2 as it is downloaded: three JSON files and a folder of videos.

Two spellings are in use, `something-something-v2-{train,validation,labels}.json` and
`{train,validation,labels}.json`, beside the videos or in a folder `labels` or `annotations`.
The split files write a template with square brackets ("Moving [something] up"), the labels file
without them; label values are strings.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from timefast.data.annotation import is_plain_relative, read_json, refuse
from timefast.data.batch import Record, VideoSet
from timefast.data.subsets import subset_labels
from timefast.errors import InputError

logger = logging.getLogger("timefast")

PUBLISHED_COUNTS = {"train": 168_913, "validation": 24_777}
PUBLISHED_CLASSES = 174
_PREFIXES = ("something-something-v2-", "")
_FOLDERS = (".", "labels", "annotations")
_VIDEO_FOLDERS = ("videos", "20bn-something-something-v2", ".")
_SUFFIXES = (".webm", ".mp4", ".mkv", ".avi")


def find(root: Path, split: str) -> Path | None:
    """The split file under `root`, or None if this is not the layout of Something-Something v2."""
    for folder in _FOLDERS:
        for prefix in _PREFIXES:
            path = root / folder / f"{prefix}{split}.json"
            if path.is_file():
                return path
    return None


def load(root: Path, split: Literal["train", "validation"], split_file: Path) -> VideoSet:
    """The records of a split. Raises InputError, with the first three offenders, if files do not
    fit each other; no video is opened here."""
    prefix = split_file.name.removesuffix(f"{split}.json")
    labels_file = split_file.with_name(f"{prefix}labels.json")
    if not labels_file.is_file():
        raise InputError(
            f"{labels_file} is missing: {split_file.name} needs it to number its classes. "
            "It comes with the annotation files of the data set"
        )
    label_of = _labels(labels_file)
    entries = _entries(split_file, label_of, labels_file)
    videos = next(f for n in _VIDEO_FOLDERS if (f := root / n).is_dir()).resolve()
    suffix = _suffix(videos, [id for id, _ in entries[:100]])
    records = tuple(
        Record(id, videos / f"{id}{suffix}", label_of[template], template)
        for id, template in entries
    )
    classes = tuple(sorted(label_of, key=label_of.__getitem__))
    if len(classes) == PUBLISHED_CLASSES:
        logger.info(
            "%s: %d %s videos (the published split has %d)",
            split_file, len(records), split, PUBLISHED_COUNTS[split],
        )  # fmt: skip
    else:
        logger.info("%s: %d %s videos, %d classes", split_file, len(records), split, len(classes))
    subsets = subset_labels(root, classes)
    return VideoSet("ssv2", split, root, records, classes, subsets, video_root=videos)


def _suffix(videos: Path, ids: Sequence[str]) -> str:
    """The ending of the first of these videos that is there."""
    there = (s for id in ids for s in _SUFFIXES if os.path.exists(videos / f"{id}{s}"))
    return next(there, _SUFFIXES[0])


def _labels(path: Path) -> dict[str, int]:
    """Class name -> label, the labels being 0..K-1."""
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise InputError(f'{path}: expected {{"name of class": "0", ...}}, got {_kind(found)}')
    advice = "Labels are the whole numbers from 0 to the number of classes less one."
    bad = [f"{name!r} has {value!r}" for name, value in found.items() if _number(value) is None]
    refuse(path, "labels that are not numbers", bad, advice)
    labels = {name: int(value) for name, value in found.items()}
    bad = [f"{name!r} has {v}" for name, v in labels.items() if not 0 <= v < len(labels)]
    refuse(path, f"labels outside 0..{len(labels) - 1}", bad, advice)
    first: dict[int, str] = {}
    bad = [
        f"{name!r} and {first[v]!r} have {v}"
        for name, v in labels.items()
        if first.setdefault(v, name) != name
    ]
    refuse(path, "labels that are given twice", bad, advice)
    return labels


def _entries(path: Path, label_of: dict[str, int], labels_file: Path) -> list[tuple[str, str]]:
    """(id, template without brackets) of each video."""
    found = read_json(path)
    if not isinstance(found, list):
        raise InputError(
            f'{path}: expected [{{"id": ..., "template": ...}}, ...], got {_kind(found)}'
        )
    if not found:
        raise InputError(f"{path}: the split is empty; is it the right file?")
    bad = [f"entry {i}: {_short(e)}" for i, e in enumerate(found) if not _is_entry(e)]
    refuse(path, 'entries without "id" and "template"', bad, "The file is of another layout.")
    entries = [(str(e["id"]), e["template"].replace("[", "").replace("]", "")) for e in found]
    bad = [repr(id) for id, _ in entries if not is_plain_relative(id)]
    refuse(
        path, "ids that are not plain names (they could lead out of the data folder)", bad,
        "Nothing was read; check where the file comes from.",
    )  # fmt: skip
    bad = [f"{id}: {name!r}" for id, name in entries if name not in label_of]
    refuse(path, f"templates that {labels_file.name} does not have", bad, "Use files that fit.")
    seen: set[str] = set()
    bad = [id for id, _ in entries if id in seen or seen.add(id)]  # type: ignore[func-returns-value]
    refuse(path, "ids that are given twice", bad, "Remove the second ones.")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("template"), str):
        return False
    return isinstance(entry.get("id"), str | int) and not isinstance(entry["id"], bool)


def _number(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _kind(value: Any) -> str:
    if value == {}:
        return "an empty object"
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
