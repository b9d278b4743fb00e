"""What `python -m timefast.scan` found out about the videos of a data set, and its use in training.

The file is JSON lines, one video each, in the data folder: path (relative to that folder), size and
time of the file when it was looked at, verdict ("ok", "short" or a kind of cpu_decode.KINDS),
reason, deep (every frame decoded), and what the video holds. Training reads it, and adds lines for
videos that have none.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from timefast.data.batch import Record, VideoSet
from timefast.errors import InputError
from timefast.log import JsonLines, read_json_lines
from timefast.pipelines.cpu_decode import VideoError

logger = logging.getLogger("timefast")

NAME = "timefast-scan.jsonl"
USABLE = ("ok", "short")
# not in the bytes of the file: may be mended without a change of its size and time, and costs
# nothing to find out again
MENDABLE = ("missing", "dangling-link", "permission", "outside-root", "no-decoder")
_NUMBERS = ("frames", "height", "width", "rotation", "resized", "hidden")
_WORDS = ("codec", "pixel_format", "verdict")


def key(path: Path, root: Path) -> str:
    """The path as the manifest of the data folder `root` writes it."""
    for base in (root, root.resolve()):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


def stamp(record: Record) -> tuple[int, int]:
    """Size of the video in bytes and time of its file's last change in nanoseconds; -1, -1 if they
    cannot be had."""
    place, _, size = record.within or (record.path, 0, None)
    try:
        found = os.stat(place)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size if size is None else size, found.st_mtime_ns


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each video, by its path. Lines that are not of a manifest are left out.

    Raises InputError if there is a file that cannot be read."""
    try:
        return {line["path"]: line for line in read_json_lines(path) if _is_line(line)}
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); make it readable or remove it, it is made "
            "anew by `python -m timefast.scan`"
        ) from error


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    texts, numbers = ("path", "verdict"), ("size", "mtime_ns", "deep")
    return all(isinstance(line.get(name), str) for name in texts) and all(
        isinstance(line.get(name), int) for name in numbers
    )


class Known:
    """What is known of the videos of a split: from a manifest, if there is one, or learnt since."""

    def __init__(self, videos: VideoSet):
        lines = read_manifest(videos.root / NAME)
        self.scanned = len(lines)
        self._bad: dict[int, tuple[str, str]] = {}
        # arrays, not objects: a set may have hundreds of thousands of videos, in every process
        count = len(videos.records)
        self._stamps = np.full((count, 2), -2, np.int64)
        self._facts = np.full((count, len(_NUMBERS) + len(_WORDS)), -1, np.int32)
        self._words: list[str] = []
        for sample, record in enumerate(videos.records if lines else ()):
            line = lines.get(key(record.path, videos.root))
            if line is not None:
                self.learn(sample, line)

    def __len__(self) -> int:
        """Videos known to be bad."""
        return len(self._bad)

    def learn(self, sample: int, line: dict[str, Any]) -> None:
        """Take in a line of a manifest."""
        self._stamps[sample] = line["size"], line["mtime_ns"]
        self._facts[sample] = -1
        self._bad.pop(sample, None)
        if line["verdict"] in MENDABLE:
            return
        if line["verdict"] not in USABLE:
            self._bad[sample] = line["verdict"], line.get("reason") or ""
        elif all(isinstance(line.get(name), int) for name in _NUMBERS):
            words = [str(line.get(name)) for name in _WORDS]
            self._words += sorted(set(words) - set(self._words))
            numbers = [line[name] for name in _NUMBERS]
            self._facts[sample] = numbers + [self._words.index(word) for word in words]

    def held(self, sample: int, record: Record) -> dict[str, Any] | None:
        """What a usable video holds, if that is known: frames, height, width, rotation, resized,
        hidden, codec, pixel_format, verdict."""
        facts = self._facts[sample].tolist()
        if facts[0] < 0 or not self.fits(sample, record):
            return None
        words = [self._words[i] for i in facts[len(_NUMBERS) :]]
        return dict(zip(_NUMBERS + _WORDS, facts[: len(_NUMBERS)] + words, strict=True))

    def fits(self, sample: int, record: Record) -> bool:
        """Whether the file was looked at and has not changed since."""
        return stamp(record) == tuple(self._stamps[sample].tolist())

    def refuse(self, sample: int, record: Record) -> None:
        """Raise VideoError for a video that was found to be bad and has not changed since."""
        if sample in self._bad and self.fits(sample, record):
            raise VideoError(*self._bad[sample])

    def changed(self, sample: int, record: Record) -> bool:
        """Whether the file is another than the one that was looked at."""
        return self._stamps[sample, 0] != -2 and not self.fits(sample, record)


class Additions:
    """Adds to the manifest what training finds out, for the next run; a folder that cannot be
    written to is said once."""

    def __init__(self, videos: VideoSet):
        self._videos = videos
        self._written: set[int] = set()
        self._lines: JsonLines | None = None
        self._refused = False

    def add(self, found: dict[int, dict[str, Any]]) -> None:
        """Lines by sample; of each sample the first counts."""
        new = {sample: line for sample, line in found.items() if sample not in self._written}
        if not new or self._refused:
            return
        self._written |= new.keys()
        records, root = self._videos.records, self._videos.root
        try:
            self._lines = self._lines or JsonLines(root / NAME)
            self._lines.write(
                *({"path": key(records[s].path, root), **line} for s, line in new.items())
            )
        except OSError as error:
            self._refused = True
            logger.info("%s is not added to: %s", root / NAME, error.strerror)

    def close(self) -> None:
        if self._lines is not None and not self._refused:
            self._lines.close()
        self._lines = None
