"""WebDataset tar files: `train-*.tar` and `validation-*.tar` (or `val-*.tar`), or folders `train/`,
`validation/` (or `val/`) with tar files.

A sample is the members that share a name up to the first dot: a video (`000.mp4`) and its label, in
`000.cls` (a number) or in `000.json` (`{"label": ...}`, a number or a name of classes.txt). The
headers of the tar files are read once, at the start; a video is then read from its place, so that
order, substitution and resuming are those of single files. The files must be on a disk of this
machine or mounted, and not compressed; addresses and pipes are not read.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from timefast.data.annotation import is_plain_relative, numbered_classes, read_text, refuse
from timefast.data.batch import Record, VideoSet
from timefast.data.folder import VIDEO_SUFFIXES
from timefast.data.subsets import subset_labels
from timefast.errors import InputError

_NAMES = {"train": ("train",), "validation": ("validation", "val")}
Place = tuple[str, int, int]  # member name, first byte and number of bytes in the tar file


def find(root: Path, split: str) -> Path | None:
    """The folder that holds the split's tar files."""
    for name in _NAMES[split]:
        for folder, pattern in ((root, f"{name}-*.tar"), (root / name, "*.tar")):
            if next(folder.glob(pattern), None) is not None:
                return folder
    return None


def load(root: Path, split: Literal["train", "validation"], folder: Path) -> VideoSet:
    """The records of a split, in the order of files and members. Raises InputError with the first
    three offenders."""
    shards = sorted(
        path
        for name in _NAMES[split]
        for path in (folder.glob(f"{name}-*.tar") if folder == root else folder.glob("*.tar"))
    )
    found = [(shard, *sample) for shard in shards for sample in _samples(shard)]
    if not found:
        raise InputError(f"{folder}: the tar files of split {split} hold no samples")
    bad = [f"{shard.name}: {key}" for shard, key, video, _ in found if video is None]
    refuse(folder, "samples without a video", bad, f"Endings: {', '.join(sorted(VIDEO_SUFFIXES))}.")
    bad = [f"{shard.name}: {key}" for shard, key, _, label in found if label is None]
    refuse(folder, "samples without a label", bad, "Expected .cls, or .json with `label`.")
    bad = [f"{shard.name}: {key!r}" for shard, key, _, _ in found if not is_plain_relative(key)]
    refuse(folder, "names that could lead out of the tar file", bad, "Nothing was read.")
    classes = _classes(root, split, found, folder)
    label_of: dict[Any, int] = {name: label for label, name in enumerate(classes)}
    label_of |= {label: label for label in range(len(classes))}
    bad = [f"{shard.name}: {key} has {y!r}" for shard, key, _, y in found if y not in label_of]
    refuse(folder, f"labels that are none of {len(classes)} classes", bad, "Correct classes.txt.")
    records = tuple(
        Record(
            f"{shard.stem}/{key}", shard / video[0], label_of[label], classes[label_of[label]],
            within=(shard, *video[1:]),
        )
        for shard, key, video, label in found
        if video is not None
    )  # fmt: skip
    return VideoSet("shards", split, root, records, classes, subset_labels(root, classes))


def _samples(shard: Path) -> Iterator[tuple[str, Place | None, int | str | None]]:
    """Name, place of the video and label of each sample of a tar file."""
    found: dict[str, tuple[Place | None, int | str | None]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                video, label = found.get(key, (None, None))
                if f".{ending.lower()}" in VIDEO_SUFFIXES:
                    video = member.name, member.offset_data, member.size
                elif ending in ("cls", "json") and (content := tar.extractfile(member)):
                    label = _label(content.read(1 << 20), ending)
                else:
                    continue
                found[key] = video, label
            end = tar.offset  # at damage behind the first member tarfile stops without a word
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged, or at its end, at byte {end}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(
            f"{shard}: cannot be read as a tar file ({error}); it may be cut off or compressed"
        ) from error
    for key, (video, label) in found.items():
        yield key, video, label


def _label(raw: bytes, ending: str) -> int | str | None:
    try:
        label = int(raw) if ending == "cls" else json.loads(raw)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if isinstance(label, str) and label.isdecimal():
        return int(label)
    return label if isinstance(label, int | str) else None


def _classes(root: Path, split: str, found: list[Any], shards: Path) -> tuple[str, ...]:
    names = root / "classes.txt"
    if names.is_file():
        return tuple(line.strip() for line in read_text(names).splitlines() if line.strip())
    labels = {label for *_, label in found}
    if any(isinstance(label, str) for label in labels):
        raise InputError(f"{names} is missing: labels are names, so it must number them")
    other = "validation" if split == "train" else "train"
    if (folder := find(root, other)) is not None:
        pattern = [f"{n}-*.tar" for n in _NAMES[other]] if folder == root else ["*.tar"]
        for shard in (path for p in pattern for path in folder.glob(p)):
            labels |= {label for _, _, label in _samples(shard) if isinstance(label, int)}
    return numbered_classes(shards, max(labels))
