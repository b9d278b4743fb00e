"""One self-contained HTML page about a run: `python -m timefast.report RUN_DIR`.

The page is made from what the run directory holds: `config.json`, `metrics.jsonl`,
`failures.jsonl` and the newest complete checkpoint. It refers to nothing outside itself. The part
that needs checkpoint and videos (frames with flow directions and frame order) says in the page why
it is missing when one of them is gone; everything else does not depend on it.
"""

import argparse
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from timefast import __version__
from timefast.errors import InputError
from timefast.log import read_json_lines, to_console
from timefast.report_clips import ClipStrip, clip_strips

logger = logging.getLogger("timefast")

BACKBONES = {"timesformer": "TimeSformer", "motionformer": "Motionformer", "xvit": "X-ViT"}
SUBSETS = {"all": "All classes", "temporal": "Temporal classes", "static": "Static classes"}
LOSSES = {
    "loss": "total",
    "loss_ce": "class",
    "loss_order": "order",
    "loss_debias": "debias",
    "loss_flow": "flow",
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Raises InputError when the folder holds no readable `config.json`.
    """
    run_dir = Path(run_dir)
    config = _read_config(run_dir)
    strips, excuse = clip_strips(run_dir, config)
    page = render(
        config,
        read_json_lines(run_dir / "metrics.jsonl"),
        read_json_lines(run_dir / "failures.jsonl"),
        strips,
        excuse,
        name=run_dir.resolve().name,
    )
    path = run_dir / "report.html"
    unfinished = path.with_name(".report.html.part")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _read_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{run_dir} is no run directory: it has no config.json. Give the folder that "
            "`python -m timefast.train` printed (its --out)."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}). Restore it, or train again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object. Restore it, or train again.")
    return config


def render(
    config: dict[str, Any],
    metrics: Iterable[dict[str, Any]],
    failures: Iterable[dict[str, Any]],
    strips: Sequence[ClipStrip],
    excuse: str | None,
    *,
    name: str,
) -> str:
    """The page as text. `excuse` says why clips are missing, None if they are not."""
    from jinja2 import Environment, FileSystemLoader

    records = [r for r in metrics if isinstance(r, dict)]
    train = _last_per(
        ("step",), [r for r in records if r.get("kind") == "train" and _finite(r.get("step"))]
    )
    evals = _last_per(
        ("step", "split", "protocol", "shuffles", "subset"),
        [r for r in records if r.get("kind") == "eval" and _finite(r.get("step"))],
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, points=_points, number=_number, value=_value)
    final = final_rows(evals)
    return environment.get_template("report_template.html").render(
        name=name,
        version=__version__,
        title=_title(config),
        state=_state(config, train),
        final=final,
        protocol=final[0].get("protocol") if final else None,
        incomplete=[r for r in final if r.get("videos_evaluated") != r.get("videos_expected")],
        subset_names=SUBSETS,
        chance=100 / len(config["classes"]) if config.get("classes") else None,
        cards=_cards(final),
        finding=_finding(final),
        loss_chart=loss_chart(train),
        accuracy_chart=accuracy_chart(evals),
        eval_steps=sorted({r["step"] for r in evals}),
        facts=_facts(config, train),
        strips=strips,
        excuse=excuse,
        failures=_failures(failures),
        sections=_sections(config),
        versions=config.get("versions") or {},
        implementations=config.get("implementations") or {},
    )


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _percent(value: Any) -> str:
    return f"{value:.1f}" if _finite(value) else "–"


def _points(value: Any) -> str:
    """A difference of percentages, with a true minus sign; no sign for what rounds to zero."""
    if not _finite(value):
        return "–"
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def _number(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if _finite(value) else "–"


def _value(value: Any) -> str:
    """A configuration value as one would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_value(v) for v in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _last_per(keys: tuple[str, ...], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In step order; of records that agree in `keys` the last: a resumed run repeats steps."""
    latest = {tuple(str(r.get(k)) for k in keys): r for r in records}
    return sorted(latest.values(), key=lambda r: r["step"])


def final_rows(evals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last evaluation, one record per class subset: all, temporal, static, others."""
    if not evals:
        return []
    last = evals[-1]
    rows = {
        r.get("subset") or "all": {**r, "gap": _gap(r)}
        for r in evals
        if all(r.get(k) == last.get(k) for k in ("step", "split", "protocol", "shuffles"))
    }
    order = [*SUBSETS, *(k for k in rows if k not in SUBSETS)]
    return [{**rows[k], "subset": k} for k in order if k in rows]


def _gap(record: dict[str, Any]) -> float | None:
    if _finite(record.get("gap")):
        return record["gap"]
    original, shuffled = record.get("top1"), record.get("shuffled_top1")
    return original - shuffled if _finite(original) and _finite(shuffled) else None


def _setting(config: dict[str, Any], section: str, key: str) -> Any:
    return ((config.get("config") or {}).get(section) or {}).get(key)


def _title(config: dict[str, Any]) -> str:
    model = config.get("model") or {}
    backbone = model.get("backbone") or _setting(config, "model", "backbone") or "unnamed model"
    losses = _setting(config, "method", "losses")
    if isinstance(losses, str):
        losses = [part for part in losses.split(",") if part not in ("", "none")]
    title = BACKBONES.get(backbone, backbone)
    return f"{title} with {_list(losses)} loss" if losses else title


def _list(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]


def _state(config: dict[str, Any], train: list[dict[str, Any]]) -> dict[str, Any]:
    done = train[-1]["step"] if train else 0
    planned = config.get("total_steps")
    if not _finite(planned):
        return {"done": done, "planned": None, "word": None}
    return {
        "done": done,
        "planned": planned,
        "word": "finished" if done >= planned else "stopped early" if done else "not started",
    }


def _cards(final: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The three or four numbers at the top of the page."""
    rows = {r["subset"]: r for r in final}
    row = rows.get("temporal") or rows.get("all") or (final[0] if final else None)
    if row is None:
        return []
    where = SUBSETS.get(row["subset"], row["subset"]).lower()
    cards = []
    if "all" in rows and row is not rows["all"]:
        cards.append({"label": "Top-1, all classes", "value": _percent(rows["all"].get("top1"))})
    cards.append({"label": f"Top-1, {where}", "value": _percent(row.get("top1"))})
    if _finite(row.get("shuffled_top1")):
        cards += [
            {"label": "The same, frames shuffled", "value": _percent(row["shuffled_top1"])},
            {"label": "Gap in points", "value": _points(row["gap"]), "strong": "yes"},
        ]
    elif _finite(row.get("top5")):
        cards.append({"label": f"Top-5, {where}", "value": _percent(row["top5"])})
    return cards


def _finding(final: list[dict[str, Any]]) -> str | None:
    parts = []
    for row in final:
        if _finite(row["gap"]) and (row["subset"] != "all" or len(final) == 1):
            where = f"on {SUBSETS.get(row['subset'], row['subset']).lower()}"
            if row["gap"] >= 0.05:
                parts.append(f"{row['gap']:.1f} points {where}")
            else:
                gain = f" ({_points(-row['gap'])})" if row["gap"] <= -0.05 else ""
                parts.append(f"nothing {where}{gain}")
    return f"Shuffling the frames costs {_list(parts)}." if parts else None


def _facts(config: dict[str, Any], train: list[dict[str, Any]]) -> list[tuple[str, str]]:
    model, clip = config.get("model") or {}, config.get("clip") or {}
    size = clip.get("crop") or model.get("image_size")
    facts: list[tuple[str, Any]] = [
        ("Recipe", config.get("recipe")),
        (
            "Model",
            ", ".join(f"{word} {model[key]}" for word, key in
                      (("width", "dim"), ("depth", "depth"), ("heads", "heads"),
                       ("patch", "patch_size")) if key in model),
        ),
        ("Input", f"{clip['frames']} frames of {_size(size)}" if "frames" in clip else None),
        ("Data", _setting(config, "data", "root")),
        ("Classes", len(config["classes"]) if config.get("classes") else None),
        ("Seed", _setting(config, "run", "seed")),
        ("Device", config.get("device")),
        ("Videos read by", config.get("pipeline")),
        ("Speed", _speed(train)),
        ("Started", str(config.get("created") or "").replace("T", " ")[:16]),
        ("Commit", config.get("git_commit")),
    ]  # fmt: skip
    return [(label, str(value)) for label, value in facts if value not in (None, "")]


def _size(size: Any) -> str:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return f"{height} × {width}"


def _speed(train: list[dict[str, Any]]) -> str | None:
    rates = [r["clips_per_s"] for r in train if _finite(r.get("clips_per_s"))]
    if not rates:
        return None
    waits = [
        r["data_s"] / r["step_s"]
        for r in train
        if _finite(r.get("data_s")) and _finite(r.get("step_s")) and r["step_s"] > 0
    ]
    speed = f"{statistics.median(rates):.3g} clips/s"
    if waits:
        speed += f", {min(1.0, statistics.median(waits)):.0%} of a step waiting for data"
    return speed


def _failures(failures: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per video and reason, most frequent first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in failures:
        if not isinstance(record, dict):
            continue
        key = str(record.get("path")), str(record.get("class"))
        count = record.get("count", 1)
        row = rows.setdefault(key, {"path": key[0], "kind": key[1], "count": 0})
        row["reason"] = record.get("reason") or ""
        row["count"] += count if _finite(count) else 1
    return sorted(rows.values(), key=lambda r: (-r["count"], r["path"]))


def _sections(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every value of the resolved configuration, by section."""
    sections = {
        k: v if isinstance(v, dict) else {k: v} for k, v in (config.get("config") or {}).items()
    }
    for key, heading in (("model", "model as built"), ("clip", "clip")):
        if config.get(key):
            sections[heading] = config[key]
    return sections


WIDTH, HEIGHT = 520, 250  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 40, 508, 12, 222  # the plotting area


@dataclass(frozen=True)
class Line:
    """One series of a chart; `tone` names its colour in the style sheet."""

    name: str
    tone: str
    points: list[tuple[float, float]]
    dashed: bool = False

    @property
    def last(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True)
class Chart:
    lines: list[Line]
    paths: list[str]  # SVG path data per line
    dots: list[list[tuple[float, float]]]  # marks per line, empty where there are many points
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    note: str


def loss_chart(train: list[dict[str, Any]]) -> Chart | None:
    lines = []
    note = ""
    for key, name in LOSSES.items():
        points = [(r["step"], r[key]) for r in train if _finite(r.get(key))]
        if len(points) < 2 or (key != "loss" and not any(y for _, y in points)):
            continue  # a part that is switched off is zero throughout
        size = math.ceil(len(points) / 100)
        if size > 1:
            note = f"each point is the mean of {size} logged steps"
        means = []
        for i in range(0, len(points), size):
            part = points[i : i + size]
            means.append((part[-1][0], statistics.fmean(y for _, y in part)))
        lines.append(Line(name, name, means))
    return _chart(lines, note)


def accuracy_chart(evals: list[dict[str, Any]]) -> Chart | None:
    protocols = [r.get("protocol") for r in evals]
    usual = max(protocols, key=protocols.count, default=None)
    lines = []
    for subset, label in SUBSETS.items():
        rows = [
            r for r in evals if (r.get("subset") or "all") == subset and r.get("protocol") == usual
        ]
        for key, suffix, dashed in (("top1", "", False), ("shuffled_top1", ", shuffled", True)):
            points = [(r["step"], r[key]) for r in rows if _finite(r.get(key))]
            if len(points) >= 2:
                name = label.removesuffix(" classes").lower() + suffix
                lines.append(Line(name, subset, points, dashed))
    return _chart(lines, "", top=100)


def _chart(lines: list[Line], note: str, top: float | None = None) -> Chart | None:
    if not lines:
        return None
    x_max = max(x for line in lines for x, _ in line.points) or 1
    values = sorted(y for line in lines for _, y in line.points)
    # one exploding step must not flatten everything else
    y_max = top or max(values[int(0.99 * (len(values) - 1))] * 1.08, 1e-6)
    y_min = min(0.0, values[0])

    def place(x: float, y: float) -> tuple[float, float]:
        up = (min(y, y_max) - y_min) / (y_max - y_min)
        return LEFT + (RIGHT - LEFT) * x / x_max, BOTTOM - (BOTTOM - TOP) * up

    placed = [[place(x, y) for x, y in line.points] for line in lines]
    return Chart(
        lines=lines,
        paths=["M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) for points in placed],
        dots=[points if len(points) <= 20 else [] for points in placed],
        x_ticks=[(place(x, y_min)[0], f"{x:,.0f}") for x in _ticks(0, x_max, 6) if x == int(x)],
        y_ticks=[(place(0, y)[1], f"{y:g}") for y in _ticks(y_min, y_max, 5)],
        note=note,
    )


def _ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m timefast.report",
        description="Write the self-contained HTML report of a run into its directory.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run")
    arguments = parser.parse_args(argv)
    to_console()
    try:
        path = write_report(arguments.run_dir)
    except InputError as error:
        logger.error("%s", error)
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
