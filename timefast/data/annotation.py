"""Reading annotation files that somebody else wrote: what is wrong with them is said precisely."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from timefast.errors import InputError

MOST_CLASSES = 100_000  # names and a head's rows are made for each, so a slip costs all memory
MOST_DIGITS = 18  # of a number in a list


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without byte order mark; InputError if it cannot be."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); "
            "save it as UTF-8"
        ) from error


def read_json(path: Path) -> Any:
    """The value in a JSON file; InputError names file, line and column of a mistake."""
    text = read_text(path)
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():  # an escape may be half a character, which nothing can print
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        return found
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); "
            "the file may be cut off: download or write it again"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be an annotation file") from error
    except ValueError as error:  # half a character, a number of thousands of digits
        raise InputError(f"{path}: no annotation file ({error})") from error


def numbered_classes(path: Path, most: int) -> tuple[str, ...]:
    """Names "0".."most" where a data set has none; InputError for a number that cannot be meant."""
    if most >= MOST_CLASSES:
        raise InputError(
            f"{path}: a label is {most}, and up to {MOST_CLASSES} classes are supported; is "
            "another number (of frames, an id) in the place of the label?"
        )
    return tuple(str(label) for label in range(most + 1))


def refuse(path: Path, problem: str, offenders: Sequence[str], advice: str) -> None:
    """Raise InputError if there are offenders, showing the first three and counting the rest."""
    if not offenders:
        return
    shown = "; ".join(o if len(o) <= 200 else o[:197] + "..." for o in offenders[:3])
    rest = f"; and {len(offenders) - 3} more" if len(offenders) > 3 else ""
    raise InputError(f"{path}: {problem}: {shown}{rest}. {advice}")


def is_number(text: str) -> bool:
    """Whether a field of a list is a whole number, 0 or more, of a length that can be meant."""
    return text.isdecimal() and len(text) <= MOST_DIGITS


def is_plain_relative(name: str) -> bool:
    """Whether a path from an annotation file can only lead below the folder it is joined to."""
    if not name or any(c in name for c in "\0\n\r"):
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts
