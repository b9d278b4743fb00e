"""What is made of a stretch of an epoch's order: the work of one decoding process for one batch.

Every choice is a function of (seed, epoch, sample): the number of processes, a restart, and where
in an epoch it happens change no batch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from timefast.data.augment import (
    Augmentation,
    apply_augmentations,
    draw_rand_augment,
    jittered_short_side,
    random_crop,
    resize_crop,
    resized,
    view_crop,
)
from timefast.data.batch import Batch, ClipSpec, Failure, Record, VideoSet
from timefast.data.rng import generator
from timefast.data.sampling import distinct_views, train_frames, view_frames
from timefast.pipelines.cpu_decode import VideoError, check_file, decode, probe, read_bytes
from timefast.pipelines.labels import clip_labels
from timefast.pipelines.manifest import MENDABLE, USABLE, Known, stamp

Job = tuple[int, int, int]  # epoch, first and end position in its order
BackEnd = Literal["cpu", "mixed"]  # DALI's names: on the CPU, or file on the CPU and frames on GPU
Made = TypeVar("Made")

# what each of DALI's decoders takes. The GPU's takes more, but whether it has AV1 or VP8, and how
# it treats the packed frames of MPEG-4, differs from chip to chip
CODECS = {"cpu": ("vp8", "vp9", "mjpeg"), "mixed": ("h264", "hevc", "vp9")}
PIXEL_FORMATS = ("yuv420p", "yuvj420p")
NVDEC_SIDES = 144, 4096  # pixels that every GPU decodes in every one of these codecs
MOST_BYTES = 64 << 20  # DALI wants whole files in memory


@dataclass
class Seen:
    """What was found out about files on the way to a batch."""

    failures: list[Failure] = field(default_factory=list)
    notices: list[Failure] = field(default_factory=list)
    found: dict[int, dict[str, Any]] = field(default_factory=dict)
    routed: list[str] = field(default_factory=list)  # classes of file that DALI does not get


@dataclass(frozen=True)
class Cuts:
    """The crops of a video's frames: clip number, top and left, after resizing to `size`."""

    size: tuple[int, int]  # height, width
    corners: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """A video that DALI is to decode, and what is to be made of its frames."""

    data: np.ndarray  # the whole file, uint8
    frames: list[int]
    height: int
    width: int
    drawn: tuple[Augmentation, ...]
    cuts: Cuts


@dataclass(frozen=True)
class Chosen:
    """A video that stands at a position of an epoch's order."""

    position: int
    step: int  # bad videos that were passed over to find it
    sample: int


@dataclass
class Raw:
    """A batch before DALI: for each video its clips, or what DALI is to make of its bytes."""

    epoch: int
    chosen: list[Chosen]
    made: list[list[torch.Tensor] | Encoded]
    seen: Seen


class Samples:
    """The batches of a split; all it remembers is which videos are bad, and what files hold.

    `at` is shared with the process that watches this one: the sample being worked on, or -1, and
    since when.
    """

    def __init__(
        self,
        videos: VideoSet,
        spec: ClipSpec,
        *,
        train: bool,
        seed: int,
        views: tuple[int, int],
        tries: int,
        labels: bool,
        dali: BackEnd | None,
    ):
        self.videos, self.spec, self.train, self.seed, self.views = videos, spec, train, seed, views
        self.labels, self.dali = labels, dali
        self.tries = min(tries, len(videos.records))
        self.known = Known(videos)
        self.bad: dict[int, Failure] = {}
        self.at: Any = [-1.0, 0.0]
        self._order = -1, np.arange(0)  # epoch, its order

    def make(self, job: Job) -> Batch | Raw:
        """The batch of a job, or where DALI decodes what it needs for that."""
        epoch, first, end = job
        seen = Seen()
        read: Callable[..., Any] = self.clips if self.dali is None else self._encoded
        found = [self.first_good(epoch, p, 0, read, seen) for p in range(first, end)]
        chosen = [f[0] for f in found if f is not None]
        made = [f[1] for f in found if f is not None]
        if self.dali is not None:
            return Raw(epoch, chosen, made, seen)
        clips = [clip for clips in made for clip in clips]
        shape = (0, 3, self.spec.frames, self.spec.crop, self.spec.crop)
        return self.batch(torch.stack(clips) if clips else torch.empty(shape), chosen, seen)

    def batch(self, video: torch.Tensor, chosen: list[Chosen], seen: Seen) -> Batch:
        """The clips of these videos, in their order, with all that belongs to them."""
        per_video = 1 if self.train else self.views[0] * self.views[1]
        samples = [c.sample for c in chosen for _ in range(per_video)]
        labels = [self.videos.records[i].label for i in samples]
        return Batch(
            video=video,
            label=torch.tensor(labels, dtype=torch.int64),
            sample=torch.tensor(samples, dtype=torch.int64),
            view=torch.arange(per_video).repeat(len(chosen)),
            flow_label=clip_labels(video, self.spec) if self.labels and len(video) else None,
            failures=seen.failures,
            notices=list(dict.fromkeys(seen.notices)),  # a video may have been read twice
            found=seen.found,
        )

    def first_good(
        self,
        epoch: int,
        position: int,
        step: int,
        read: Callable[[Record, int, int, Seen], Made],
        seen: Seen,
    ) -> tuple[Chosen, Made] | None:
        """The first video from this position on, `step` passed over, that `read` can read."""
        order = self.epoch_order(epoch)
        for passed in range(step, self.tries):
            sample = int(order[(position + passed) % len(order)])
            record = self.videos.records[sample]
            self.at[1] = time.monotonic()  # first: who reads in between must not think it hangs
            self.at[0] = sample
            try:
                made = self._read(read, record, sample, epoch, seen)
                return Chosen(position, passed, sample), made
            except VideoError as error:
                self.bad[sample] = self.failure(sample, error.kind, error.reason)
                seen.failures.append(self.bad[sample])
            finally:
                self.at[0] = -1
        return None

    def failure(self, sample: int, kind: str, reason: str) -> Failure:
        record = self.videos.records[sample]
        return Failure(record.id, str(record.path), kind, reason)

    def epoch_order(self, epoch: int) -> np.ndarray:
        count = len(self.videos.records)
        if not self.train:
            return np.arange(count)
        if self._order[0] != epoch:
            self._order = epoch, generator(self.seed, epoch, 0, "order").permutation(count)
        return self._order[1]

    def _read(
        self,
        read: Callable[[Record, int, int, Seen], Made],
        record: Record,
        sample: int,
        epoch: int,
        seen: Seen,
    ) -> Made:
        if sample in self.bad:
            raise VideoError(self.bad[sample].kind, self.bad[sample].reason)
        self.known.refuse(sample, record)
        try:
            return read(record, sample, epoch, seen)
        except VideoError as error:
            if self.known.changed(sample, record):
                reason = f"not the file that was scanned any more; now {error.kind}: {error.reason}"
                raise VideoError("changed", reason) from error
            self._learn(sample, record, {"verdict": error.kind, "reason": error.reason}, seen)
            raise

    def _learn(self, sample: int, record: Record, line: dict[str, Any], seen: Seen) -> None:
        """Remember what a file holds, and pass it on, unless a scan has said so before."""
        if line["verdict"] in (*MENDABLE, "timeout"):  # which may be the fault of the machine
            return
        more = "resized" in line and self.known.held(sample, record) is None
        if self.known.fits(sample, record) and line["verdict"] in USABLE and not more:
            return
        size, mtime_ns = stamp(record)
        line = {"size": size, "mtime_ns": mtime_ns, "deep": False, "by": "training", **line}
        self.known.learn(sample, line)
        seen.found[sample] = line

    def clips(self, record: Record, sample: int, epoch: int, seen: Seen) -> list[torch.Tensor]:
        """The clips of one video, float32 [3, T, S, S] each, decoded by PyAV."""
        decoded = decode(
            record.path,
            lambda n: self._frames(n, sample, epoch),
            self.videos.video_root or self.videos.root,
            record.within,
        )
        verdict = "ok" if decoded.short is None else "short"
        line = {"verdict": verdict, "reason": decoded.short, **decoded.held}
        del line["short"]
        self._learn(sample, record, line, seen)
        seen.notices += self._notices(record, decoded.counted, decoded.short)
        frames = apply_augmentations(decoded.frames, self._drawn(sample, epoch), self.fill())
        cuts = self._cuts(frames.shape[1], frames.shape[2], sample, epoch)
        clips = np.split(frames, len(frames) // self.spec.frames)
        return [
            resize_crop(clips[clip], cuts.size, top, left, self.spec)
            for clip, top, left in cuts.corners
        ]

    def _encoded(
        self, record: Record, sample: int, epoch: int, seen: Seen
    ) -> list[torch.Tensor] | Encoded:
        """The bytes of a video and what DALI is to make of them; or its clips, if it is not to."""
        assert self.dali is not None
        root = self.videos.video_root or self.videos.root
        check_file(record.path, root, record.within)  # whatever a manifest says of it
        held = self.known.held(sample, record)
        if held is None:
            line = probe(record.path, root, record.within, deep=False)
            short = line.pop("short")
            line = {"verdict": "short" if short else "ok", "reason": short, **line}
            self._learn(sample, record, line, seen)
            held = line
        bytes_ = stamp(record)[0]
        if (reason := why_not_dali(held, bytes_, self.dali)) is not None:
            seen.routed.append(reason)
            return self.clips(record, sample, epoch, seen)
        counted, height, width = held["frames"], held["height"], held["width"]
        seen.notices += self._notices(record, counted, None)
        try:
            data = np.frombuffer(read_bytes(record.path, record.within), np.uint8)
        except OSError as error:
            raise VideoError("unreadable", f"cannot be read: {error}") from error
        return Encoded(
            data, self._frames(counted, sample, epoch), height, width,
            self._drawn(sample, epoch), self._cuts(height, width, sample, epoch),
        )  # fmt: skip

    def fill(self) -> tuple[int, int, int]:
        """The colour that stands for nothing: the mean."""
        red, green, blue = (round(255 * value) for value in self.spec.mean)
        return red, green, blue

    def _frames(self, n: int, sample: int, epoch: int) -> list[int]:
        frames = self.spec.frames
        if self.train:
            return train_frames(n, frames, generator(self.seed, epoch, sample, "frames"))
        views = self.views[0]
        return [i for view in range(views) for i in view_frames(n, frames, view, views)]

    def _drawn(self, sample: int, epoch: int) -> tuple[Augmentation, ...]:
        if not self.train or self.spec.rand_augment is None:
            return ()
        rng = generator(self.seed, epoch, sample, "augment")
        return draw_rand_augment(self.spec.rand_augment, rng)

    def _cuts(self, height: int, width: int, sample: int, epoch: int) -> Cuts:
        spec = self.spec
        if self.train:
            rng = generator(self.seed, epoch, sample, "crop")
            size = resized(height, width, jittered_short_side(*spec.short_side, rng))
            return Cuts(size, ((0, *random_crop(*size, spec.crop, rng)),))
        size = resized(height, width, spec.test_short_side)
        temporal, spatial = (range(count) for count in self.views)
        crops = [view_crop(*size, spec.crop, view, self.views[1]) for view in spatial]
        return Cuts(size, tuple((clip, *crop) for clip in temporal for crop in crops))

    def _notices(self, record: Record, counted: int, short: str | None) -> list[Failure]:
        notices = []
        if short is not None:
            notices.append(Failure(record.id, str(record.path), "short", short))
        if not self.train:
            differ = distinct_views(counted, self.spec.frames, self.views[0])
            if differ < self.views[0]:
                reason = f"{differ} of {self.views[0]} temporal views of its {counted} frames"
                notices.append(
                    Failure(record.id, str(record.path), "views-collapsed", f"{reason} differ")
                )
        return notices


def why_not_dali(held: dict[str, Any], size: int, back_end: BackEnd) -> str | None:
    """The class of file that DALI is not to decode to which this one belongs, if any."""
    if held["codec"] not in CODECS[back_end]:
        return f"codec {held['codec']}"
    if held["pixel_format"] not in PIXEL_FORMATS:
        return f"pixel format {held['pixel_format']}"
    if held["rotation"]:
        return "rotated by the header"
    if held["verdict"] == "short":
        return "cut off"
    if held["resized"]:
        return "frame size changes on the way"
    if held["hidden"]:
        return "frames that an edit list hides"
    if size > MOST_BYTES:
        return f"more than {MOST_BYTES >> 20} MiB"
    short, long = sorted((held["height"], held["width"]))
    if back_end == "mixed" and not (NVDEC_SIDES[0] <= short and long <= NVDEC_SIDES[1]):
        return "sides not within {} to {} pixels".format(*NVDEC_SIDES)
    return None
