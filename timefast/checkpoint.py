"""Checkpoints that survive a kill at any instant.

A checkpoint is a folder `checkpoints/step-<n>/` with `model.safetensors`, `state.pt` and
`index.json`. It is written under a temporary name, each file flushed to disk, `index.json` with
the checksum of each file last, then renamed. It counts only if `index.json` is there and the
checksums hold: neither file format notices a flipped bit by itself.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from timefast.errors import InputError

logger = logging.getLogger("timefast")
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    step: int
    path: Path
    weights: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    state: dict[str, Any],
    describe: dict[str, Any],
) -> Path:
    """Write `checkpoints/step-<n>`; `describe` goes into the header of model.safetensors.

    Raises OSError, RuntimeError or safetensors' own error when the disk refuses; what was there
    before is then untouched.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    if problem(final) is None:
        return final
    side = folder / f".tmp-step-{step}"
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir()
    try:
        header = {"timefast": json.dumps({"format": FORMAT, **describe})}
        tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        save_file(tensors, side / "model.safetensors", metadata=header)
        torch.save(state, side / "state.pt")
        sums = {name: _checksum(side / name) for name in ("model.safetensors", "state.pt")}
        for name in sums:
            _flush(side / name)
        index = {"format": FORMAT, "step": step, "sha256": sums}
        (side / "index.json").write_text(json.dumps(index, indent=1), "utf-8")
        _flush(side / "index.json")
        _flush(side)
        shutil.rmtree(final, ignore_errors=True)  # only ever an incomplete one
        os.replace(side, final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(side, ignore_errors=True)
        raise
    return final


def prune(run: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, and what a killed run left behind.

    `step` is the one just written. A later one is there only if it was found damaged: it must not
    push out a sound one, and is replaced when the run comes to it.
    """
    for leftover in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    until_now = [p for p in list_checkpoints(run) if int(p.name.removeprefix("step-")) <= step]
    for path in until_now[keep:]:
        (path / "index.json").unlink()  # from here on it does not count
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run that claim to be complete, newest step first."""
    found = []
    for path in (run / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and (path / "index.json").exists():
            found.append((int(number), path))
    return [path for _, path in sorted(found, reverse=True)]


def problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if it is complete and its checksums hold."""
    try:
        index = json.loads((path / "index.json").read_text("utf-8"))
        if index["format"] > FORMAT:
            return f"it has format {index['format']}, newer than {FORMAT}: update timefast"
        for name, expected in index["sha256"].items():
            if _checksum(path / name) != expected:
                return f"{name} does not have the checksum that index.json states"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"index.json cannot be read ({error})"
    return None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest sound checkpoint; None if there never was one.

    A damaged newer one is passed over with a warning. Raises InputError if all are damaged: a run
    that has history never starts again from nothing unasked.
    """
    paths = list_checkpoints(run)
    for path in paths:
        wrong = problem(path)
        if wrong is None:
            return path
        logger.warning("checkpoint %s is damaged: %s; trying the one before", path, wrong)
    if paths:
        raise InputError(
            f"{run}: all {len(paths)} checkpoints are damaged (the newest: {problem(paths[0])}). "
            "Start a new run in another folder, or restore them from a backup."
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a sound checkpoint folder. No code in it is ever executed."""
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    weights = load_file(path / "model.safetensors")
    return Checkpoint(int(path.name.removeprefix("step-")), path, weights, state)


def read_description(file: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` was told to describe; None for a file that is not of this project."""
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("timefast")
    return None if text is None else json.loads(text)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
