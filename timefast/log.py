"""Everything a run says: console lines, and one JSON object per line in a file.

The library never prints; commands call `to_console()` once.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger("timefast")


class _Console(logging.Handler):
    """Plain lines on standard error, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def to_console(level: int = logging.INFO) -> None:
    """Show the library's messages; what a command calls first."""
    logger.handlers[:] = [_Console()]
    logger.setLevel(level)
    logger.propagate = False


class JsonLines:
    """Append-only JSON lines; they are complete in the file when `write` returns.

    What a full disk refuses (OSError) is kept and written with the next lines.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, *records: dict[str, Any]) -> None:
        self._file.write("".join(json.dumps(r, allow_nan=False) + "\n" for r in records))
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def replace_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace the whole file at once."""
    side = path.with_name(f".tmp-{path.name}")
    side.write_text("".join(json.dumps(r, allow_nan=False) + "\n" for r in records), "utf-8")
    os.replace(side, path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete objects; a half-written last line, as a killed run leaves it, is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
