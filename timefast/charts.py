"""Pictures of the analyses, drawn from their records by matplotlib. Every function writes one PNG.

matplotlib is imported when something is drawn: it is slow to load.
"""

from pathlib import Path
from typing import Any

# in the order of the models of a record; legible for people who do not tell red from green
COLOURS = ("#0068b5", "#b35900", "#007a5e", "#a13d92", "#14181f", "#868e9a")
_INK, _SOFT, _RULE = "#14181f", "#58616e", "#e3e6eb"


def save_probe(record: dict[str, Any], path: Path) -> None:
    """Accuracy of the order classifier over the blocks, one line per model."""
    figure, axes = _axes("Where the order of frames is known", "block", "frames in place, %")
    models = record["models"]
    for number, (model, name) in enumerate(zip(models, model_names(record), strict=True)):
        values = model["accuracy"]
        look = {"color": _colour(number), "lw": 1.8, "ms": 4, "zorder": 10 - number}
        axes.plot(range(1, len(values) + 1), values, "o-", label=name, clip_on=False, **look)
    depth = max(len(model["accuracy"]) for model in models)
    for chance in sorted({model["chance"] for model in models}):  # clips of other lengths
        axes.axhline(chance, color=_SOFT, lw=1, ls=(0, (2, 3)))
        axes.annotate("chance", (depth, chance), (0, 3), textcoords="offset points", ha="right",
                      color=_SOFT, fontsize=8)  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_xticks(range(1, depth + 1))
    _finish(figure, axes, path, len(models))


def save_confidence(record: dict[str, Any], path: Path) -> None:
    """Share of the videos over their confidence gap, one outline per model."""
    figure, axes = _axes(
        "What shuffling the frames takes from the confidence",
        "confidence in order minus shuffled", "share of videos",
    )  # fmt: skip
    models = record["models"]
    for number, (model, name) in enumerate(zip(models, model_names(record), strict=True)):
        bins = model["mass"], model["edges"]
        axes.stairs(*bins, color=_colour(number), lw=1.8, label=name, zorder=10 - number)
        axes.stairs(*bins, color=_colour(number), alpha=0.15, fill=True)
    axes.set_ylim(bottom=0)
    axes.set_xlim(*shown_range(models))
    _finish(figure, axes, path, len(models))


def shown_range(models: list[dict[str, Any]]) -> tuple[float, float]:
    """The part of the gap's axis in which some model has videos."""
    filled = [
        edge
        for model in models
        for i, mass in enumerate(model["mass"])
        if mass > 0
        for edge in model["edges"][i : i + 2]
    ]
    return min(filled, default=-1.0), max(filled, default=1.0)


def model_names(record: dict[str, Any]) -> list[str]:
    """What a legend calls the models of a record: the last part of the path where that tells them
    apart, else the whole of it."""
    paths = [Path(model["source"]) for model in record["models"]]
    short = [path.stem if path.suffix else path.name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=10)
    axes.set_xlabel(x, color=_SOFT, fontsize=9)
    axes.set_ylabel(y, color=_SOFT, fontsize=9)
    axes.tick_params(colors=_SOFT, labelsize=8, length=0)
    axes.grid(axis="y", color=_RULE, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    return figure, axes


def _finish(figure: Any, axes: Any, path: Path, models: int) -> None:
    if models > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    figure.savefig(path, dpi=160)
