"""Temporal and static classes of Something-Something v2, as appendix A of the TIME paper lists them
(after Sevilla-Lara et al., 2021).

"temporal" holds the six temporal classes that the paper's Temporal subset uses, "temporal18" all
eighteen, "static" the Static subset. The paper counts sixteen static classes; its list has
seventeen names, since "Holding something next to something" and "Pouring something into something"
stand there as one. All seventeen are kept here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from timefast.data.annotation import read_json, read_text, refuse
from timefast.data.batch import VideoSet
from timefast.errors import InputError

_TEMPORAL = (
    "Lifting something up completely without letting it drop down",
    "Lifting something up completely, then letting it drop down",
    "Lifting up one end of something, then letting it drop down",
    "Moving something and something closer to each other",
    "Moving something and something away from each other",
    "Moving something and something so they collide with each other",
)
PAPER: dict[str, tuple[str, ...]] = {
    "temporal": _TEMPORAL,
    "temporal18": (
        *_TEMPORAL,
        "Turning something upside down",
        "Approaching something with your camera",
        "Moving something away from the camera",
        "Moving away from something with your camera",
        "Moving something towards the camera",
        "Lifting something with something on it",
        "Moving something away from something",
        "Moving something closer to something",
        "Uncovering something",
        "Pretending to turn something upside down",
        "Covering something with something",
        "Stuffing something into something",
    ),
    "static": (
        "Folding something",
        "Turning the camera upwards while filming something",
        "Holding something next to something",
        "Pouring something into something",
        "Pretending to throw something",
        "Squeezing something",
        "Holding something in front of something",
        "Touching (without moving) part of something",
        "Lifting up one end of something without letting it drop down",
        "Showing something next to something",
        "Poking something so that it falls over",
        "Wiping something off of something",
        "Scooping something up with something",
        "Letting something roll down a slanted surface",
        "Sprinkling something onto something",
        "Pushing something so it spins",
        "Twisting (wringing) something wet until water comes out",
    ),
}


def subset_labels(root: Path, classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Labels of each class subset: from `root`/subsets.json if it is there, else the paper's.

    subsets.json maps a name to a list of class names. Of the paper's subsets those are left out of
    which `classes` lacks a name. Raises InputError for a subsets.json that does not fit.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    path = root / "subsets.json"
    if not path.exists():
        return {
            subset: tuple(sorted(label_of[name] for name in names))
            for subset, names in PAPER.items()
            if label_of.keys() >= set(names)
        }
    return read_subsets(path, label_of)


def read_subsets(path: Path, label_of: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Labels of the subsets that a JSON file maps to lists of class names."""
    found = read_json(path)
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and all(isinstance(n, str) for n in names)
        for names in found.values()
    ):
        raise InputError(f'{path}: expected {{"name of subset": ["name of class", ...], ...}}')
    names = [name for names in found.values() for name in names]
    unknown = [repr(name) for name in names if _plain(name) not in label_of]
    refuse(path, "classes that the data set does not have", unknown, "Correct the names.")
    return {
        subset: tuple(sorted({label_of[_plain(name)] for name in names}))
        for subset, names in found.items()
    }


def labels_of(videos: VideoSet, name: str) -> tuple[int, ...]:
    """Labels of a subset of the data set, or of the classes that a file names, one a line.

    Raises InputError if `name` is neither, or a name in the file is not of a class.
    """
    if name in videos.subsets:
        return videos.subsets[name]
    file = Path(name)
    if not file.is_file():
        known = ", ".join(videos.subsets) or "none here"
        raise InputError(f"--subset {name}: neither a file nor a subset of this data set ({known})")
    label_of = {c: label for label, c in enumerate(videos.classes)}
    names = [_plain(line.strip()) for line in read_text(file).splitlines() if line.strip()]
    unknown = [n for n in names if n not in label_of]
    if unknown or not names:
        raise InputError(
            f"--subset {file}: not class names of {videos.root}: {unknown[:3] or 'empty file'}"
        )
    return tuple(sorted({label_of[n] for n in names}))


def restrict(videos: VideoSet, labels: Sequence[int]) -> VideoSet:
    """The data set of these classes alone, numbered anew from 0 in the order given."""
    new = {old: label for label, old in enumerate(labels)}
    records = tuple(
        replace(r, label=new[r.label]) for r in videos.records if r.label in new
    )  # fmt: skip
    if not records:
        raise InputError(
            f"{videos.root} has no {videos.split} video of the {len(labels)} classes of the subset"
        )
    kept = {
        subset: tuple(new[old] for old in members)
        for subset, members in videos.subsets.items()
        if new.keys() >= set(members)
    }
    classes = tuple(videos.classes[old] for old in labels)
    return replace(videos, records=records, classes=classes, subsets=kept)


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "")
