"""Write the tables of README.md and docs/benchmarks.md from bench/results/*.json, nothing else.

    python -m bench.report            rewrite the tables in place
    python -m bench.report --check    exit with 1 if one of them is stale

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is the `what` of result
files `<what>_<device>_<yyyy-mm-dd>_<commit>.json`, or `speed` and `step-speed`, the short forms of
`ops` and `train_step`. Of several files with the same `what` and device the newest counts. Rates
are computed here from the bytes, operations and medians that the files hold.

Most files are lists of records, one per measurement: op, impl, case, shapes, dtype, direction,
median, p20, p80 (seconds), peak_memory (bytes or null), bytes, flops, error, device, driver,
versions, commit, dirty; those of pipelines have `clips`, the number done in one call, instead of
bytes and flops. `demo-losses` files hold one object with `protocol` and `rows`, one row
per set of losses and seed.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/benchmarks.md")
# Operations per second in products of 16 bits, and bytes per second, that a GPU can do at most: by
# the data sheet of the A100; measured on an H200 (a product of 8192 x 8192 matrices, a copy).
CEILINGS = {"A100": (312e12, 2.0e12), "H200": (790e12, 4.3e12)}
MARKER = re.compile(r"(<!-- table:(\S+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
EMPTY = "Not yet measured.\n"


@dataclass(frozen=True)
class Result:
    path: Path
    what: str
    device: str  # as in the file name
    date: str
    content: Any


def newest(root: Path, what: str) -> list[Result]:
    """The newest result file of each device, in order of device."""
    found: dict[str, Result] = {}
    for path in sorted((root / "bench" / "results").glob(f"{what}_*.json")):
        parts = path.stem.rsplit("_", 3)
        if len(parts) != 4 or parts[0] != what:
            continue
        result = Result(path, what, parts[1], parts[2], json.loads(path.read_text("utf-8")))
        if parts[1] not in found or found[parts[1]].date <= result.date:
            found[parts[1]] = result
    return [found[device] for device in sorted(found)]


def demo_losses(root: Path, link: str) -> str:
    """Accuracy on the demo data set, mean ± sample standard deviation over seeds."""
    head = (
        "Losses", "Temporal", "shuffled", "gap", "Cue agrees / conflicts", "Static", "shuffled",
        "All", "Confidence / shuffled",
    )  # fmt: skip
    names = {  # in the order of table 3 of the paper
        "none": "baseline",
        "order": "+ order",
        "debias": "+ debias",
        "order,debias": "+ order, debias",
        "flow": "+ flow",
        "order,flow": "+ order, flow",
        "debias,flow": "+ debias, flow",
        "order,debias,flow": "**TIME** (all three)",
    }
    text = []
    for result in newest(root, "demo-losses"):
        rows = result.content["rows"]
        table = []
        for losses, name in names.items():
            runs = [r for r in rows if r["losses"] == losses]
            if not runs:
                continue
            table.append((
                name, _spread(runs, "temporal_original"), _spread(runs, "temporal_shuffled"),
                _spread(runs, "temporal_gap"),
                f"{_spread(runs, 'aligned')} / {_spread(runs, 'conflict')}",
                _spread(runs, "static_original"), _spread(runs, "static_shuffled"),
                _spread(runs, "all_original"),
                f"{_spread(runs, 'confidence', 2)} / {_spread(runs, 'shuffled_confidence', 2)}",
            ))  # fmt: skip
        seeds = sorted({r["seed"] for r in rows})
        seconds = [r["seconds"] for r in rows if r["seconds"] is not None]
        took = f"; {min(seconds):.0f} to {max(seconds):.0f} s a run" if seconds else ""
        text.append(
            _markdown(head, table)
            + f"\nSeeds {', '.join(map(str, seeds))}: mean ± sample standard deviation, accuracies "
            f"in percent{took}. Protocol: {result.content['protocol'].rstrip('.')}. "
            f"{_source(result, link)}\n"
        )
    return "\n".join(text) or EMPTY


def records(root: Path, link: str, what: str) -> str:
    """Every measurement of the newest files: one table per device, without empty columns."""
    text = []
    for result in newest(root, what):
        head = (
            "Op", "Case", "dtype", "Direction", "Implementation", "Median (p20 to p80)",
            "Peak memory", "Kept for backward", "GB/s", "TFLOP/s", "Of the floor", "Clips/s",
            "Error",
        )  # fmt: skip
        rows = [
            (
                f"`{r['op']}`", _case(r), r.get("dtype") or "", r.get("direction") or "", r["impl"],
                f"{_time(r['median'])} ({_time(r['p20'])} to {_time(r['p80'])})",
                _bytes(r.get("peak_memory")), _bytes(r.get("kept_memory")),
                _rate(r, "bytes", 1e9), _rate(r, "flops", 1e12),
                _share_of_floor(r), _rate(r, "clips", 1.0),
                "" if r.get("error") is None else f"{r['error']:.1e}",
            )
            for group in _groups(result.content)
            for r in group
        ]  # fmt: skip
        filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
        table = _markdown([head[i] for i in filled], [[row[i] for i in filled] for row in rows])
        text.append(f"{table}\n{_source(result, link)}\n")
    return "\n".join(text) or EMPTY


def speed(root: Path, link: str) -> str:
    """Per case forward and backward of our fastest implementation beside the fastest other one."""
    head = ("Op", "Case", "timefast", "Best other", "Ratio")
    text = []
    for result in newest(root, "ops"):
        rows = []
        for group in _groups(result.content):
            ours = [r for r in group if r["impl"] in ("triton", "cpu")]
            others = [r for r in group if r not in ours]
            if not ours or not others or ours[0]["direction"] != "fwd+bwd":
                continue
            best, other = ours[0], others[0]
            rows.append((
                f"`{best['op']}`", f"{_case(best)}, {best['dtype']}",
                f"{_time(best['median'])} ({best['impl']})",
                f"{_time(other['median'])} ({other['impl']})",
                f"{other['median'] / best['median']:.2f} ×",
            ))  # fmt: skip
        if rows:
            text.append(f"{_markdown(head, rows)}\n{_source(result, link)}\n")
    if not any("a100" in result.device.lower() for result in newest(root, "ops")):
        text.append("Not yet measured on an A100.\n")
    return "\n".join(text)


def train_step(root: Path, link: str) -> str:
    """Per backbone the techniques of a step, row by row; each row keeps those above it."""
    head = (
        "Step", "dtype", "Median", "Clips/s", "Against the published form", "Utilisation",
        "Peak memory", "Kept for backward", "Loss difference",
    )  # fmt: skip
    text = []
    for result in newest(root, "train_step"):
        cases: dict[str, list[dict[str, Any]]] = {}
        for r in _compared(result):
            cases.setdefault(f"{r['case']}, {r['clips']} clips", []).append(r)
        for case, measured in cases.items():
            rows = [
                (
                    r["impl"], r["dtype"], _time(r["median"]), _rate(r, "clips", 1.0),
                    f"{r['speedup']:.2f} ×",
                    f"{r['flops'] / r['median'] / r['matmul_rate']:.0%}", _bytes(r["peak_memory"]),
                    _bytes(r["kept_memory"]), f"{r['error']:.1e}",
                )
                for r in measured
            ]  # fmt: skip
            filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
            table = _markdown([head[i] for i in filled], [[row[i] for i in filled] for row in rows])
            text.append(f"**{case}**\n\n{table}")
        if cases:
            text.append(f"{_source(result, link)}\n")
    return "\n".join(text) or EMPTY


def _compared(result: Result) -> list[dict[str, Any]]:
    """Records that were measured against the published form; files of before have none."""
    return [r for r in result.content if "speedup" in r]


def step_speed(root: Path, link: str) -> str:
    """Per backbone the whole step against its published form, for the front page."""
    text = []
    for result in newest(root, "train_step"):
        rows = []
        for r in _compared(result):
            if "(timefast)" in r["impl"]:
                case = f"{r['case']}, {r['clips']} clips, {r['dtype']}"
                rows.append((case, _rate(r, "clips", 1.0), f"{r['speedup']:.2f} ×"))
        head = ("Training step", "Clips/s", "Against the published form")
        if rows:
            text.append(f"{_markdown(head, rows)}\n{_source(result, link)}\n")
    if not any("a100" in result.device.lower() for result in newest(root, "train_step")):
        text.append("Not yet measured on an A100.\n")
    return "\n".join(text)


def _groups(measured: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Measurements of the same thing together, fastest implementation first."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in measured:
        key = r["op"], _case(r), str(r.get("dtype")), str(r.get("direction"))
        groups.setdefault(key, []).append(r)
    return [sorted(group, key=lambda r: r["median"]) for group in groups.values()]


TABLES: dict[str, Callable[[Path, str], str]] = {
    "demo-losses": demo_losses,
    "speed": speed,
    "ops": lambda root, link: records(root, link, "ops"),
    "trajectory": lambda root, link: records(root, link, "trajectory"),
    "flow": lambda root, link: records(root, link, "flow"),
    "pipelines": lambda root, link: records(root, link, "pipelines"),
    "train-step": train_step,
    "step-speed": step_speed,
}


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _source(result: Result, link: str) -> str:
    """Device, versions, date, commit, and the file that a table was made from."""
    first = result.content[0] if isinstance(result.content, list) else result.content
    versions = ", ".join(f"{k} {v}" for k, v in (first.get("versions") or {}).items() if v)
    driver = f", driver {first['driver']}" if first.get("driver") else ""
    dirty = " with uncommitted changes" if first.get("dirty") else ""
    return (
        f"{first['device']}{driver}; {versions}; {result.date}, commit {first['commit']}{dirty}: "
        f"[{result.path.name}]({link}bench/results/{result.path.name})."
    )


def _spread(runs: Sequence[dict[str, Any]], key: str, digits: int = 1) -> str:
    """Mean ± sample standard deviation; a single run has none."""
    values = [run[key] for run in runs if run.get(key) is not None]
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _case(record: dict[str, Any]) -> str:
    return str(record.get("case") or record.get("size") or record["shapes"])


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _bytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


def _rate(record: dict[str, Any], key: str, unit: float) -> str:
    return f"{record[key] / record['median'] / unit:.3g}" if record.get(key) else ""


def _share_of_floor(record: dict[str, Any]) -> str:
    """The least time that the operations and bytes counted can take, as a part of the median."""
    for name, (operations, bandwidth) in CEILINGS.items():
        if name in record["device"] and record.get("dtype") in ("bfloat16", "float16"):
            work, moved = record.get("flops") or 0, record.get("bytes") or 0
            floor = max(work / operations, moved / bandwidth)
            return f"{floor / record['median']:.0%}" if floor else ""
    return ""


def rewrite(text: str, root: Path, link: str) -> str:
    """A page with every table made anew; `link` leads from the page to the repository root.

    Raises ValueError for a marker whose name is not known or that is not closed.
    """
    if text.count("<!-- table:") != len(MARKER.findall(text)):
        raise ValueError("a <!-- table:NAME --> marker is not closed by <!-- /table -->")

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"unknown table {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](root, link)}{match[4]}"

    return MARKER.sub(table, text)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only say which pages are stale")
    check = parser.parse_args(argv).check
    stale = 0
    for name in PAGES:
        page = root / name
        if not page.exists():
            continue
        old = page.read_text("utf-8")
        new = rewrite(old, root, "../" * name.count("/"))
        if new == old:
            continue
        if check:
            stale = 1
            sys.stdout.write(f"{name} is stale; run: python -m bench.report\n")
        else:
            page.write_text(new, "utf-8")
            sys.stdout.write(f"{name} rewritten\n")
    return stale


if __name__ == "__main__":
    sys.exit(main())
