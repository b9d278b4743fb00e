"""What `python -m timefast.scan` found out about the videos of a data set, and its use in training.

The file is JSON lines, one video each, in the data folder: path (relative to that folder), size and
time of the file when it was looked at, verdict ("ok", "short" or a kind of cpu_decode.KINDS),
reason, deep (every frame decoded), and what the video holds.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from timefast.data.batch import VideoSet
from timefast.log import read_json_lines
from timefast.pipelines.cpu_decode import VideoError

NAME = "timefast-scan.jsonl"
USABLE = ("ok", "short")


def key(path: Path, root: Path) -> str:
    """The path as the manifest of the data folder `root` writes it."""
    for base in (root, root.resolve()):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds; -1, -1 if it cannot be had."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each video, by its path. Lines that are not of a manifest are left out."""
    return {line["path"]: line for line in read_json_lines(path) if _is_line(line)}


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    texts, numbers = ("path", "verdict"), ("size", "mtime_ns", "deep")
    return all(isinstance(line.get(name), str) for name in texts) and all(
        isinstance(line.get(name), int) for name in numbers
    )


class Known:
    """What the manifest of a data set, if it has one, says of the records of a split."""

    def __init__(self, videos: VideoSet):
        lines = read_manifest(videos.root / NAME)
        self.scanned = len(lines)
        self._bad: dict[int, tuple[str, str]] = {}
        # arrays, not objects: a set may have hundreds of thousands of videos, in every worker
        self._stamps = np.full((len(videos.records) if lines else 0, 2), -2, np.int64)
        if not lines:
            return
        for sample, record in enumerate(videos.records):
            line = lines.get(key(record.path, videos.root))
            if line is not None:
                self._stamps[sample] = line["size"], line["mtime_ns"]
                if line["verdict"] not in USABLE:
                    self._bad[sample] = line["verdict"], line.get("reason") or ""

    def __len__(self) -> int:
        """Videos known to be bad."""
        return len(self._bad)

    def refuse(self, sample: int, path: Path) -> None:
        """Raise VideoError for a video that was found to be bad and has not changed since."""
        if sample in self._bad and not self.changed(sample, path):
            raise VideoError(*self._bad[sample])

    def changed(self, sample: int, path: Path) -> bool:
        """Whether the file is another than the one that was looked at."""
        if not len(self._stamps) or self._stamps[sample, 0] == -2:
            return False
        return stamp(path) != tuple(self._stamps[sample].tolist())
