"""Which videos of a data set cannot be used, and why: `python -m timefast.scan DIR`.

The fast form reads every file and decodes its first frame; --deep decodes all frames. Findings are
written to a manifest in the data folder, line by line: a scan that is interrupted goes on where it
stopped, and a later one looks at new and changed files only. Training reads the manifest, if there
is one, and does not try files that are known to be bad.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from timefast.data import Split, has_split, open_videos
from timefast.data.batch import Failure, Record
from timefast.data.folder import VIDEO_SUFFIXES
from timefast.errors import InputError, RunError
from timefast.log import JsonLines, to_console
from timefast.pipelines.cpu_decode import VideoError, probe
from timefast.pipelines.manifest import MENDABLE, NAME, USABLE, key, read_manifest, stamp
from timefast.pipelines.workers import Workers

logger = logging.getLogger("timefast")

PART = 16  # videos that a process is given at a time
LINE_EVERY = 5000  # videos, where there is no terminal for a bar
Job = tuple[Record, Path, str, bool]  # video, folder it must lie in, its name in the manifest, deep


def scan(
    root: Path, *, deep: bool = False, workers: int | None = None, manifest: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Look at every video of the data set in `root`; returns the manifest's lines by path.

    A folder that holds no data set of a known layout is searched for video files. Raises InputError
    if there is nothing to look at or the manifest cannot be written.
    """
    root = root.expanduser().absolute()
    manifest = manifest or root / NAME
    files = list(_files(root))
    known = read_manifest(manifest)
    found: dict[str, dict[str, Any]] = {}
    jobs: list[Job] = []
    for record, folder in files:
        name = key(record.path, root)
        line = known.get(name)
        same = line and (line["size"], line["mtime_ns"]) == stamp(record) and line["deep"] >= deep
        # what training found bad is looked at again: a file server may have had a bad moment
        again = line and ("by" in line or line["verdict"] in (*MENDABLE, "timeout"))
        if line and same and (line["verdict"] in USABLE or not again):
            found[name] = line
        else:
            jobs.append((record, folder, name, deep))
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    logger.info("%d videos, %d of them looked at before", len(files), len(found))
    try:
        lines = JsonLines(manifest)
        bad = sum(line["verdict"] not in USABLE for line in found.values())
        bar = tqdm(_looks(jobs, workers), "scan", len(jobs), unit="video", disable=None)
        for done, line in enumerate(bar, start=1):
            lines.write(line)
            found[line["path"]] = line
            bad += line["verdict"] not in USABLE
            bar.set_postfix(bad=bad, refresh=False)
            if bar.disable and done % LINE_EVERY == 0:
                logger.info("%d of %d videos looked at, %d bad", done, len(jobs), bad)
        lines.close()
        _rewrite(manifest, found)
    except OSError as error:
        raise InputError(
            f"cannot write {manifest}: {error.strerror}; name another place with --manifest "
            "(training reads the manifest of the data folder only)"
        ) from error
    return found


def _files(root: Path) -> Iterator[tuple[Record, Path]]:
    """Each video with the folder under which it must lie."""
    both: tuple[Split, ...] = ("train", "validation")
    splits = [split for split in both if has_split(root, split)]
    seen: set[Path] = set()
    for split in splits:
        videos = open_videos(root, split)
        for record in videos.records:
            if record.path not in seen:
                seen.add(record.path)
                yield record, videos.video_root or videos.root
    if splits:
        return
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    walk = os.walk(root, onerror=_not_listed)
    paths = (Path(top, name) for top, folders, files in walk for name in folders + files)
    for path in sorted(path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES):
        seen.add(path)
        yield Record(path.name, path, 0, ""), root
    if not seen:
        raise InputError(f"{root} holds no data set of a known layout and no video files")


def _not_listed(error: OSError) -> None:
    logger.warning("%s: %s; videos in it are not looked at", error.filename, error.strerror)


def _looks(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    looks = _Looks(jobs)
    if workers <= 1 or len(jobs) < 2:
        yield from map(looks.look, range(len(jobs)))
        return
    parts = [range(i, min(i + PART, len(jobs))) for i in range(0, len(jobs), PART)]
    pool = Workers(looks, min(workers, len(parts)))
    try:
        for lines in pool.batches(parts):
            yield from lines
    finally:
        pool.close()


class _Looks:
    """What the watched processes of pipelines/workers.py do: a part of the jobs, line by line."""

    labels = False

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.paths = [record.path for record, *_ in jobs]
        self.bad: dict[int, Failure] = {}
        self.at: Any = [-1.0, 0.0]

    def make(self, part: range) -> list[dict[str, Any]]:
        return [self.look(number) for number in part]

    def failure(self, number: int, kind: str, reason: str) -> Failure:
        return Failure(self.jobs[number][2], str(self.paths[number]), kind, reason)

    def look(self, number: int) -> dict[str, Any]:
        record, folder, name, deep = self.jobs[number]
        size, mtime_ns = stamp(record)
        line: dict[str, Any] = {"path": name, "size": size, "mtime_ns": mtime_ns, "deep": deep}
        if number in self.bad:
            return {**line, "verdict": self.bad[number].kind, "reason": self.bad[number].reason}
        self.at[1] = time.monotonic()
        self.at[0] = number
        try:
            held = probe(record.path, folder, record.within, deep=deep)
        except VideoError as error:
            return {**line, "verdict": error.kind, "reason": error.reason}
        finally:
            self.at[0] = -1
        short = held.pop("short")
        return {**line, "verdict": "short" if short else "ok", "reason": short, **held}


def _rewrite(manifest: Path, found: dict[str, dict[str, Any]]) -> None:
    """One line a video, in the order of the data set."""
    side = manifest.with_name(f".tmp-{manifest.name}")
    side.write_text("".join(json.dumps(line) + "\n" for line in found.values()), "utf-8")
    os.replace(side, manifest)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Verdicts with their counts, and the first ten bad files."""
    counts = Counter(line["verdict"] for line in found.values())
    lines = [f"{count:8d}  {verdict}" for verdict, count in counts.most_common()]
    bad = [line for line in found.values() if line["verdict"] not in USABLE]
    lines += [f"{line['path']}: {line['verdict']}, {line['reason']}" for line in bad[:10]]
    if len(bad) > 10:
        lines.append(f"and {len(bad) - 10} more")
    # a file name may be bytes that are no text, which cannot be printed
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m timefast.scan",
        description="Find the videos of a data set that cannot be used, and say why.",
        epilog="Exit code: 0 if all videos can be used, 1 if not, 2 for wrong usage or input.",
    )
    parser.add_argument("dir", type=Path, help="data folder, or any folder with videos")
    parser.add_argument("--deep", action="store_true", help="decode every frame")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--manifest", type=Path, help=f"file to write (default: DIR/{NAME})")
    args = parser.parse_args(argv)
    to_console()
    try:
        found = scan(args.dir, deep=args.deep, workers=args.workers, manifest=args.manifest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    print(table(found))
    return 0 if all(line["verdict"] in USABLE for line in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
