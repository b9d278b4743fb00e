"""Data sets: annotation files become records; nothing is decoded here."""

import os
from pathlib import Path
from typing import Literal

from timefast.data import folder, kinetics, shards, ssv2, ucf_hmdb
from timefast.data.batch import VideoSet
from timefast.errors import InputError

Split = Literal["train", "validation"]
_LAYOUTS = (
    (ssv2.find, ssv2.load),
    (kinetics.find, kinetics.load),
    (ucf_hmdb.find_ucf, ucf_hmdb.load_ucf),
    (ucf_hmdb.find_hmdb, ucf_hmdb.load_hmdb),
    (shards.find, shards.load),
    (folder.find_list, folder.load_list),
    (folder.find_classes, folder.load_classes),
)


def open_videos(root: str | Path, split: Split) -> VideoSet:
    """One split of the data set in the folder `root`, whose layout is recognised.

    Layouts: Something-Something v2 (data/ssv2.py), Kinetics (kinetics.py), UCF101 and HMDB51
    (ucf_hmdb.py), WebDataset tar files (shards.py), lists and class folders (folder.py).
    Raises InputError if there is none of them or its files do not fit each other.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")
    root = Path(root).expanduser().absolute()
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise InputError(
            f"data folder {root} {what}; give the folder that holds the annotation files, or "
            "make a small data set with `python -m timefast.demo_data DIR`"
        )
    try:
        for find, load in _LAYOUTS:
            if (path := find(root, split)) is not None:
                return load(root, split, path)
        entries = sorted(entry.name for entry in root.iterdir())
    except OSError as error:
        raise _unreadable(root, error) from error
    raise InputError(
        f"{root} holds no {split} split of a layout known here. Expected one of: "
        f"something-something-v2-{split}.json or {split}.json (Something-Something v2), "
        f"{split}.csv (lines `path label`, or Kinetics' own), the split files of UCF101 or HMDB51, "
        f"{split}-*.tar (WebDataset), or a folder {split}/ with a folder per class. "
        f"Found: {', '.join(entries[:8]) + (', ...' if len(entries) > 8 else '') or 'nothing'}"
    )


def has_split(root: str | Path, split: Split) -> bool:
    """Whether the folder holds such a split in a layout known here."""
    root = Path(root).expanduser().absolute()
    try:
        return any(find(root, split) is not None for find, _ in _LAYOUTS)
    except OSError as error:
        raise _unreadable(root, error) from error


def _unreadable(root: Path, error: OSError) -> InputError:
    return InputError(
        f"{error.filename or root}: cannot be read ({error.strerror}); make the data folder "
        "readable for this user"
    )
