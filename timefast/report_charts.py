"""The charts of a run's report, as paths and ticks of an SVG that the page draws."""

import math
import statistics
from dataclasses import dataclass
from typing import Any, TypeGuard

from timefast.charts import model_names, shown_range

SUBSETS = {"all": "All classes", "temporal": "Temporal classes", "static": "Static classes"}
LOSSES = {
    "loss": "total",
    "loss_ce": "class",
    "loss_order": "order",
    "loss_debias": "debias",
    "loss_flow": "flow",
}
TONES = ("temporal", "static", "flow", "debias", "total")  # colours of the models of an analysis

WIDTH, HEIGHT = 520, 250  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 40, 508, 12, 222  # the plotting area


@dataclass(frozen=True)
class Line:
    """One series of a chart; `tone` names its colour in the style sheet."""

    name: str
    tone: str
    points: list[tuple[float, float]]
    dashed: bool = False
    marked: bool = True  # a dot at each point, where there are few
    said: str | None = None  # in the legend instead of the last value

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
        points = [(r["step"], r[key]) for r in train if is_finite(r.get(key))]
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
            points = [(r["step"], r[key]) for r in rows if is_finite(r.get(key))]
            if len(points) >= 2:
                name = label.removesuffix(" classes").lower() + suffix
                lines.append(Line(name, subset, points, dashed))
    return _chart(lines, "", top=100)


def probe_chart(record: dict[str, Any] | None) -> Chart | None:
    """How many frames an order classifier puts in their place, over the blocks."""
    lines = []
    for number, (model, name) in enumerate(_models(record)):
        points = [(float(block), value) for block, value in enumerate(model["accuracy"], 1)]
        lines.append(Line(name, TONES[number % len(TONES)], points))
    if not lines:
        return None
    chance = record["models"][0]["chance"] if record else 0.0
    depth = max(len(line.points) for line in lines)
    across = Line("chance", "all", [(1, chance), (depth, chance)], dashed=True, marked=False)
    return _chart([*lines, across], "", top=100, left=min(1, depth - 1))


def confidence_chart(record: dict[str, Any] | None) -> Chart | None:
    """Percent of the videos over their confidence gap, in steps."""
    models = _models(record)
    low, high = shown_range([model for model, _ in models])
    lines = []
    for number, (model, name) in enumerate(models):
        bins = zip(model["edges"], model["edges"][1:], model["mass"], strict=False)
        steps = [(x, 100 * m) for a, b, m in bins if low <= a < high for x in (a, b)]
        points = [(low, 0.0), *steps, (high, 0.0)]
        said = f"{model['gap']:+.2f}".replace("-", "−")
        tone = TONES[number % len(TONES)]
        lines.append(Line(name, tone, points, marked=False, said=said))
    return _chart(lines, "", left=low, whole=False)


def _models(record: dict[str, Any] | None) -> list[tuple[dict[str, Any], str]]:
    """The models of a record of timefast.probe or confidence, and what a legend calls them."""
    return list(zip(record["models"], model_names(record), strict=True)) if record else []


def _chart(
    lines: list[Line],
    note: str,
    top: float | None = None,
    left: float = 0.0,
    whole: bool = True,
) -> Chart | None:
    """`top` and `left` are the ends of the axes, found from the values otherwise; `whole` keeps
    ticks at whole numbers."""
    if not lines:
        return None
    x_max = max(x for line in lines for x, _ in line.points) or 1
    values = sorted(y for line in lines for _, y in line.points)
    # one exploding step must not flatten everything else
    y_max = top or max(values[int(0.99 * (len(values) - 1))] * 1.08, 1e-6)
    y_min = min(0.0, values[0])

    def place(x: float, y: float) -> tuple[float, float]:
        up = (min(y, y_max) - y_min) / (y_max - y_min)
        return LEFT + (RIGHT - LEFT) * (x - left) / (x_max - left), BOTTOM - (BOTTOM - TOP) * up

    placed = [[place(x, y) for x, y in line.points] for line in lines]
    return Chart(
        lines=lines,
        paths=["M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) for points in placed],
        dots=[
            points if line.marked and len(points) <= 20 else []
            for line, points in zip(lines, placed, strict=True)
        ],
        x_ticks=[
            (place(x, y_min)[0], f"{x:,.0f}" if whole else f"{x:g}".replace("-", "−"))
            for x in _ticks(left, x_max, 6)
            if not whole or x == int(x)
        ],
        y_ticks=[(place(0, y)[1], f"{y:g}") for y in _ticks(y_min, y_max, 5)],
        note=note,
    )


def _ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
