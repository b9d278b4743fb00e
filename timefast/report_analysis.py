"""What timefast.probe, confidence and gradcam left in a run's folder, for its report."""

import base64
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timefast.charts import model_names

logger = logging.getLogger("timefast")
PICTURES = 4  # Grad-CAM pictures shown


@dataclass(frozen=True)
class CamPicture:
    """A Grad-CAM strip of one video."""

    id: str
    uri: str
    models: list[tuple[str, dict[str, Any]]]  # name, record


@dataclass(frozen=True)
class Analysis:
    """Records as their commands wrote them; what is not there is None or empty."""

    probe: dict[str, Any] | None
    confidence: dict[str, Any] | None
    cams: list[CamPicture]


def read_analysis(folder: Path) -> Analysis | None:
    """The analyses in a folder; None if there are none. One that cannot be read is left out with a
    warning: a page about a run must not be lost to it."""
    cams = []
    for path in sorted(folder.glob("gradcam-*.json"))[:PICTURES]:
        record = _record(path, ("label", "probability", "class"))
        picture = path.with_suffix(".png")
        if record is not None and picture.is_file():
            uri = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
            models = list(zip(model_names(record), record["models"], strict=True))
            cams.append(CamPicture(str(record.get("id")), uri, models))
    found = Analysis(
        probe=_record(folder / "probe.json", ("accuracy", "chance", "protocol")),
        confidence=_record(folder / "confidence.json", ("edges", "mass", "gap", "protocol")),
        cams=cams,
    )
    return found if found.probe or found.confidence or found.cams else None


def _record(path: Path, needed: tuple[str, ...]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        models = record["models"]
        whole = bool(models) and all({"source", *needed} <= model.keys() for model in models)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("report without %s: %s", path, error)
        return None
    if not whole:
        logger.warning("report without %s: it lacks some of %s", path, ", ".join(needed))
        return None
    return record
