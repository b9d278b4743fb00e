"""What flows between the floors: records of a data set, clips and batches."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Record:
    """One labelled video of a split."""

    id: str
    path: Path
    label: int
    template: str  # class name as the split file spells it, without square brackets
    # in a tar file: that file, first byte and number of bytes; `path` is then tar file / member
    within: tuple[Path, int, int] | None = None


@dataclass(frozen=True)
class VideoSet:
    """One split of a data set: records, class names by label, where it lies."""

    name: str  # "ssv2", "synthetic", ...
    split: Literal["train", "validation"]
    root: Path
    records: tuple[Record, ...]
    classes: tuple[str, ...]
    subsets: dict[str, tuple[int, ...]] = field(default_factory=dict)  # "temporal" -> labels
    video_root: Path | None = None  # videos must resolve to a place under it (None: under root)

    def fingerprint(self) -> dict[str, int | str]:
        """Number of videos, and SHA-256 of class names, ids and labels in their order: equal for
        one split wherever it lies."""
        said = [list(self.classes), [[r.id, r.label] for r in self.records]]
        text = json.dumps(said, separators=(",", ":"))
        return {"videos": len(self.records), "sha256": hashlib.sha256(text.encode()).hexdigest()}


@dataclass(frozen=True)
class ClipSpec:
    """How a video becomes the model's input."""

    frames: int = 8
    crop: int = 224  # pixels, square
    short_side: tuple[int, int] = (256, 320)  # training: jitter, uniform in 1/size
    test_short_side: int = 224
    rand_augment: str | None = "rand-m20-mstd0.5-inc1"  # None: off
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    flow_rule: Literal["minmax", "tau"] | None = "minmax"  # None: no flow labels
    flow_tau: float | None = None  # pixels at crop resolution, for rule "tau"
    flow_impl: str = "auto"  # implementation of ops.farneback
    patch_size: int = 16


@dataclass(frozen=True)
class Failure:
    """A video that could not be used."""

    id: str
    path: str
    kind: str  # "missing", "empty", "not-a-video", "unreadable", "no-video", "corrupt", ...
    reason: str


@dataclass
class Batch:
    """B clips, or in evaluation B = videos x views, the views of one video together."""

    video: torch.Tensor  # float32 [B, 3, T, height, width], normalised
    label: torch.Tensor  # int64 [B]
    sample: torch.Tensor  # int64 [B], index of the record in VideoSet.records
    view: torch.Tensor  # int64 [B], view number (0 in training)
    flow_label: torch.Tensor | None = None  # int64 [B, T-1, N], classes 0..8
    failures: list[Failure] = field(default_factory=list)
    notices: list[Failure] = field(default_factory=list)  # used, but "short" or "views-collapsed"
    found: dict[int, dict[str, Any]] = field(default_factory=dict)  # sample -> news for a manifest

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory; a DataLoader calls this by name."""
        return self._map(torch.Tensor.pin_memory)

    def used_on(self, device: torch.device) -> "Batch":
        """This batch, made on another stream; its memory is kept for the current one's use."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            for tensor in (self.video, self.label, self.sample, self.view, self.flow_label):
                if tensor is not None:
                    tensor.record_stream(stream)
        return self

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        flow = None if self.flow_label is None else move(self.flow_label)
        return Batch(
            move(self.video), move(self.label), move(self.sample), move(self.view), flow,
            self.failures, self.notices, self.found,
        )  # fmt: skip


def stand_in(spec: ClipSpec, clips: int, sample: int) -> Batch:
    """Black clips for a process that has none of a batch but must compute with the others."""
    patches = (spec.crop // spec.patch_size) ** 2
    return Batch(
        video=torch.zeros(clips, 3, spec.frames, spec.crop, spec.crop),
        label=torch.zeros(clips, dtype=torch.int64),
        sample=torch.full((clips,), sample),
        view=torch.arange(clips),
        flow_label=torch.zeros(clips, spec.frames - 1, patches, dtype=torch.int64),
    )
