"""The folder of a run: one writer at a time, one configuration for its whole life."""

import fcntl
import json
import os
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from timefast.config import TrainConfig, flag_of, sections
from timefast.errors import InputError

# what may differ between a run and its continuation without changing the numbers it computes
CHANGEABLE = {
    ("run", "out"), ("run", "device"), ("run", "eval_every"), ("run", "log_every"),
    ("run", "save_every"), ("run", "keep"), ("run", "views"), ("run", "shuffles"),
    ("data", "root"), ("data", "workers"), ("data", "max_bad_fraction"),
    ("data", "max_bad_in_a_row"), ("optim", "max_steps"), ("run", "timeout"), ("run", "shard"),
    ("run", "profile"), ("run", "checkpoint_activations"), ("run", "cuda_graphs"),
}  # fmt: skip


def new_run_name(recipe: str) -> Path:
    """`runs/<recipe>-<time>`, with a number where that second already has one."""
    name = Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    candidate = name
    while candidate.exists():
        number += 1
        candidate = name.with_name(f"{name.name}-{number}")
    return candidate


def newest_run(recipe: str) -> Path | None:
    """The youngest run folder of a recipe below `runs/`."""
    found = [p for p in Path("runs").glob(f"{recipe}-2*") if (p / "config.json").exists()]
    return max(found, key=lambda p: (p / "config.json").stat().st_mtime, default=None)


def make_run_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".tmp-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"--out {path}: cannot be written ({error.strerror}); name another folder"
        ) from error


def lock_run(path: Path) -> TextIO:
    """Hold the returned file open for as long as the run lasts; the lock dies with the process.

    Forked processes let go of it: a decoding process that outlives a killed run by some seconds
    would keep the run from being continued.
    Raises InputError naming host, process and start time of the holder when the run is in use.
    """
    try:
        file = (path / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}/.lock: cannot be written ({error.strerror})") from error
    os.register_at_fork(after_in_child=file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(
            f"{path} is being written by {holder}; wait for it, stop it, or choose another --out"
        ) from None
    file.truncate(0)
    start = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}, started {start}")
    file.flush()
    return file


def stored_config(path: Path) -> TrainConfig | None:
    """The configuration a run folder was made with; None if it holds none."""
    file = path / "config.json"
    if not file.exists():
        return None
    try:
        return TrainConfig.from_dict(json.loads(file.read_text("utf-8"))["config"])
    except KeyError as error:
        raise InputError(
            f"{file} is not the configuration of a run: it has no entry {error}; choose another "
            "--out"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); choose another --out") from error


def refuse_differences(old: TrainConfig, new: TrainConfig, path: Path) -> None:
    """InputError naming each field in which a continued run would differ from its beginning."""
    differing = []
    for section in sections():
        before, after = getattr(old, section), getattr(new, section)
        for name, value in vars(before).items():
            if value != getattr(after, name) and (section, name) not in CHANGEABLE:
                flag = flag_of(section, name)
                differing.append(f"  {flag}: {value} there, {getattr(after, name)} asked for")
    if differing:
        raise InputError(
            "\n".join(
                [f"{path} holds a run with another configuration:", *differing]
                + ["Leave these flags out to continue it, or choose another --out."]
            )
        )


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once, never leaving half of it."""
    side = path.with_name(f".tmp-{path.name}")
    side.write_text(json.dumps(value, indent=1, allow_nan=False), "utf-8")
    os.replace(side, path)


def versions() -> dict[str, str | None]:
    """Versions of everything that can change a run's numbers."""
    names = ("timefast", "torch", "triton", "numpy", "av", "opencv-python-headless", "pillow")
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> str | None:
    """Commit of the source tree this package runs from, with `+dirty` if it was changed."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None  # installed, perhaps inside a repository of something else

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return commit + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
