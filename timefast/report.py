"""One self-contained HTML page about a run: `python -m timefast.report RUN_DIR`.

The page is made from what the run directory holds: `config.json`, `metrics.jsonl`,
`failures.jsonl`, the newest complete checkpoint, and the charts of its `analysis/`. It refers to
nothing outside itself. The part that needs checkpoint and videos (frames with flow directions and
frame order) says in the page why it is missing when one of them is gone; everything else does not
depend on it.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from timefast import __version__
from timefast.errors import InputError
from timefast.log import read_json_lines, to_console
from timefast.report_analysis import Analysis, read_analysis
from timefast.report_charts import (
    SUBSETS,
    accuracy_chart,
    confidence_chart,
    is_finite,
    loss_chart,
    probe_chart,
)
from timefast.report_clips import ClipStrip, clip_strips

BACKBONES = {"timesformer": "TimeSformer", "motionformer": "Motionformer", "xvit": "X-ViT"}


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
        read_analysis(run_dir / "analysis"),
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
    analysis: Analysis | None = None,
    *,
    name: str,
) -> str:
    """The page as text. `excuse` says why clips are missing, None if they are not; `analysis` is
    what timefast.probe, confidence and gradcam left in the run's folder."""
    from jinja2 import Environment, FileSystemLoader

    records = [r for r in metrics if isinstance(r, dict)]
    train = _last_per(
        ("step",), [r for r in records if r.get("kind") == "train" and is_finite(r.get("step"))]
    )
    evals = _last_per(
        ("step", "split", "protocol", "shuffles", "subset"),
        [r for r in records if r.get("kind") == "eval" and is_finite(r.get("step"))],
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
        analysis=analysis,
        probe_chart=analysis and probe_chart(analysis.probe),
        confidence_chart=analysis and confidence_chart(analysis.confidence),
        failures=_failures(failures),
        sections=_sections(config),
        versions=config.get("versions") or {},
        implementations=config.get("implementations") or {},
    )


def _percent(value: Any) -> str:
    return f"{value:.1f}" if is_finite(value) else "–"


def _points(value: Any) -> str:
    """A difference of percentages, with a true minus sign; no sign for what rounds to zero."""
    if not is_finite(value):
        return "–"
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def _number(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if is_finite(value) else "–"


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
    if is_finite(record.get("gap")):
        return record["gap"]
    original, shuffled = record.get("top1"), record.get("shuffled_top1")
    return original - shuffled if is_finite(original) and is_finite(shuffled) else None


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
    if not is_finite(planned):
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
    if is_finite(row.get("shuffled_top1")):
        cards += [
            {"label": "The same, frames shuffled", "value": _percent(row["shuffled_top1"])},
            {"label": "Gap in points", "value": _points(row["gap"]), "strong": "yes"},
        ]
    elif is_finite(row.get("top5")):
        cards.append({"label": f"Top-5, {where}", "value": _percent(row["top5"])})
    return cards


def _finding(final: list[dict[str, Any]]) -> str | None:
    parts = []
    for row in final:
        if is_finite(row["gap"]) and (row["subset"] != "all" or len(final) == 1):
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
    rates = [r["clips_per_s"] for r in train if is_finite(r.get("clips_per_s"))]
    if not rates:
        return None
    waits = [
        r["data_s"] / r["step_s"]
        for r in train
        if is_finite(r.get("data_s")) and is_finite(r.get("step_s")) and r["step_s"] > 0
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
        row["count"] += count if is_finite(count) else 1
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
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
