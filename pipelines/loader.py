"""From the records of a data set to batches of clips, the same whatever decodes them.

Every choice is a function of (seed, epoch, sample): the number of workers, a restart, and where in
an epoch it happens change no batch. A worker makes whole batches, one job at a time.
"""

import logging
import os
import signal
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from timefast.data.augment import (
    apply_augmentations,
    draw_rand_augment,
    jittered_short_side,
    parse_rand_augment,
    random_crop,
    resize_crop,
    resized,
    view_crop,
)
from timefast.data.batch import Batch, ClipSpec, Failure, Record, VideoSet
from timefast.data.rng import generator
from timefast.data.sampling import distinct_views, train_frames, view_frames
from timefast.errors import InputError
from timefast.kernels.farneback import opencv_without_threads
from timefast.pipelines import cpu_decode
from timefast.pipelines.cpu_decode import Decoded, VideoError, decode
from timefast.pipelines.labels import clip_labels
from timefast.pipelines.manifest import Known

logger = logging.getLogger("timefast")

MOST_WORKERS = 16
SECONDS_AFTER_SIGTERM = 30  # what a worker has to deliver the batches a stopping run still needs
Job = tuple[int, int, int]  # epoch, first and end position in its order


class ClipLoader:
    """Batches of clips of a split.

    In training an epoch visits the videos in a random order, one clip each, the last batch may be
    short, and a bad video is replaced by the next good one in the order (up to `max_bad_in_a_row`
    bad ones are passed over). In evaluation each video gives views[0] temporal x views[1] spatial
    clips (1 or 3), which stand together; the order is that of the records and a bad video is
    absent. Either way it is in `Batch.failures`.

    `batch_size` counts videos. `workers` is a number of processes (0: none; None: from the number
    of cores). Batches come out on `device`; flow labels are made in the workers, or on the device
    if that is a GPU. `pipeline` says what decodes; the attribute of that name says what was chosen.

    Raises InputError for a ClipSpec that cannot be met, NotImplementedError with the reasons for a
    pipeline that cannot run here.
    """

    def __init__(
        self,
        videos: VideoSet,
        spec: ClipSpec,
        *,
        train: bool,
        batch_size: int,
        seed: int = 0,
        workers: int | None = 0,
        pipeline: Literal["auto", "cpu", "dali"] = "auto",
        device: str | torch.device = "cpu",
        views: tuple[int, int] = (1, 1),
        max_bad_in_a_row: int = 50,
    ):
        _check(spec, batch_size, views, train)
        self.videos = videos
        self.batch_size = batch_size
        self._train = train
        self.device = torch.device(device)
        self.pipeline = _choose(pipeline, train)
        if workers is not None and workers < 0:
            raise InputError(f"workers: expected 0 or more, got {workers}")
        cores = len(os.sched_getaffinity(0))
        if workers is None:
            # on a CPU the model needs cores as well
            workers = min(cores // 2 if self.device.type == "cpu" else cores - 1, MOST_WORKERS)
        self.workers = min(workers, len(self))
        self._spec = spec
        self._labels_on_device = train and self.device.type != "cpu"
        self._jobs = _Jobs(len(videos.records), batch_size)
        many: dict[str, Any] = {}
        if self.workers:
            many = {"persistent_workers": True, "worker_init_fn": _start_worker}
        self._loader = DataLoader(
            _Batches(
                videos,
                spec,
                train,
                seed,
                views,
                labels=train and not self._labels_on_device,
                tries=max_bad_in_a_row if train else 1,
            ),
            batch_size=None,  # a job is a whole batch
            sampler=self._jobs,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # so that iterating draws nothing from torch's own
            **many,
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.videos.records) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from number `start` on.

        Raises InputError if so many videos in a row are bad that none is substituted.
        """
        self._jobs.epoch, self._jobs.start = epoch, start
        for (_, first, end), batch in zip(self._jobs, self._loader, strict=True):
            if self._train and len(batch.label) < end - first:
                raise InputError(_all_bad(batch.failures))
            batch = batch.to(self.device)
            if self._labels_on_device:
                batch.flow_label = clip_labels(batch.video, self._spec)
            yield batch

    def close(self) -> None:
        """End the workers; a later call of `batches` starts new ones."""
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None


class _Jobs(Sampler[Job]):
    """Which videos each batch of the current epoch holds, by their position in its order."""

    def __init__(self, videos: int, batch_size: int):
        self.videos, self.batch_size = videos, batch_size
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[Job]:
        for first in range(self.start * self.batch_size, self.videos, self.batch_size):
            yield self.epoch, first, min(first + self.batch_size, self.videos)


class _Batches(Dataset[Batch]):
    """A batch for a job; all it remembers is which videos are bad."""

    def __init__(
        self,
        videos: VideoSet,
        spec: ClipSpec,
        train: bool,
        seed: int,
        views: tuple[int, int],
        labels: bool,
        tries: int,
    ):
        self.videos, self.spec, self.train, self.seed = videos, spec, train, seed
        self.views, self.labels = views, labels
        self.tries = min(tries, len(videos.records))
        self.known = Known(videos)
        self.bad: dict[int, Failure] = {}
        self._order = -1, np.arange(0)  # epoch, its order

    def __getitem__(self, job: Job) -> Batch:
        epoch, first, end = job
        clips: list[torch.Tensor] = []
        samples: list[int] = []
        failures: list[Failure] = []
        notices: list[Failure] = []
        order = self._epoch_order(epoch)
        for position in range(first, end):
            for step in range(self.tries):
                sample = int(order[(position + step) % len(order)])
                record = self.videos.records[sample]
                try:
                    made = self._clips(record, sample, epoch, notices)
                except VideoError as error:
                    self.bad[sample] = Failure(
                        record.id, str(record.path), error.kind, error.reason
                    )
                    failures.append(self.bad[sample])
                    continue
                clips += made
                samples += [sample] * len(made)
                break
        per_video = 1 if self.train else self.views[0] * self.views[1]
        shape = (0, 3, self.spec.frames, self.spec.crop, self.spec.crop)
        video = torch.stack(clips) if clips else torch.empty(shape)
        return Batch(
            video=video,
            label=torch.tensor([self.videos.records[i].label for i in samples], dtype=torch.int64),
            sample=torch.tensor(samples, dtype=torch.int64),
            view=torch.arange(per_video).repeat(len(samples) // per_video),
            flow_label=clip_labels(video, self.spec) if self.labels and clips else None,
            failures=failures,
            notices=notices,
        )

    def _epoch_order(self, epoch: int) -> np.ndarray:
        count = len(self.videos.records)
        if not self.train:
            return np.arange(count)
        if self._order[0] != epoch:
            self._order = epoch, generator(self.seed, epoch, 0, "order").permutation(count)
        return self._order[1]

    def _clips(
        self, record: Record, sample: int, epoch: int, notices: list[Failure]
    ) -> list[torch.Tensor]:
        """The clips of one video, float32 [3, T, S, S] each."""
        if sample in self.bad:
            raise VideoError(self.bad[sample].kind, self.bad[sample].reason)
        self.known.refuse(sample, record.path)
        try:
            decoded = decode(
                record.path,
                lambda n: self._frames(n, sample, epoch),
                self.videos.video_root or self.videos.root,
            )
        except VideoError as error:
            if self.known.changed(sample, record.path):
                reason = f"not the file that was scanned any more; now {error.kind}: {error.reason}"
                raise VideoError("changed", reason) from error
            raise
        notices += self._notices(record, decoded)
        if self.train:
            return [self._train_clip(decoded.frames, sample, epoch)]
        return self._view_clips(decoded.frames)

    def _frames(self, n: int, sample: int, epoch: int) -> list[int]:
        frames = self.spec.frames
        if self.train:
            return train_frames(n, frames, generator(self.seed, epoch, sample, "frames"))
        views = self.views[0]
        return [i for view in range(views) for i in view_frames(n, frames, view, views)]

    def _train_clip(self, frames: np.ndarray, sample: int, epoch: int) -> torch.Tensor:
        spec = self.spec
        if spec.rand_augment is not None:
            rng = generator(self.seed, epoch, sample, "augment")
            red, green, blue = (round(255 * value) for value in spec.mean)
            drawn = draw_rand_augment(spec.rand_augment, rng)
            frames = apply_augmentations(frames, drawn, (red, green, blue))
        rng = generator(self.seed, epoch, sample, "crop")
        short_side = jittered_short_side(*spec.short_side, rng)
        size = resized(frames.shape[1], frames.shape[2], short_side)
        return resize_crop(frames, size, *random_crop(*size, spec.crop, rng), spec)

    def _view_clips(self, frames: np.ndarray) -> list[torch.Tensor]:
        spec = self.spec
        size = resized(frames.shape[1], frames.shape[2], spec.test_short_side)
        return [
            resize_crop(clip, size, *view_crop(*size, spec.crop, view, self.views[1]), spec)
            for clip in np.split(frames, self.views[0])
            for view in range(self.views[1])
        ]

    def _notices(self, record: Record, decoded: Decoded) -> list[Failure]:
        notices = []
        if decoded.short is not None:
            notices.append(Failure(record.id, str(record.path), "short", decoded.short))
        if not self.train:
            differ = distinct_views(decoded.counted, self.spec.frames, self.views[0])
            if differ < self.views[0]:
                reason = (
                    f"{differ} of {self.views[0]} temporal views of its {decoded.counted} frames"
                )
                notices.append(
                    Failure(record.id, str(record.path), "views-collapsed", f"{reason} differ")
                )
        return notices


def _start_worker(number: int) -> None:
    # the main process decides what a signal means; workers end when it does. SIGTERM is put off
    # and not ignored, since it is also how Python ends the workers of a main process that failed
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
    if get_worker_info().dataset.labels:  # type: ignore[union-attr]
        opencv_without_threads()


def _as_it_is(batch: Any) -> Any:
    return batch


def _check(spec: ClipSpec, batch_size: int, views: tuple[int, int], train: bool) -> None:
    if batch_size < 1:
        raise InputError(f"batch size: expected at least 1, got {batch_size}")
    if views[0] < 1 or views[1] not in (1, 3):
        raise InputError(f"views: expected 1 or more temporal x 1 or 3 spatial, got {views}")
    low, high = spec.short_side
    if train and not spec.crop <= low <= high:
        raise InputError(
            f"short side: expected {spec.crop} (the crop) <= low <= high, got {low} and {high}"
        )
    if spec.test_short_side < spec.crop:
        raise InputError(
            f"test short side: expected at least the crop, {spec.crop}, got {spec.test_short_side}"
        )
    if spec.rand_augment is not None:
        parse_rand_augment(spec.rand_augment)


def _choose(pipeline: str, train: bool) -> str:
    """The name of the pipeline that decodes; NotImplementedError with reasons if it cannot."""
    if pipeline not in ("auto", "cpu", "dali"):
        raise ValueError(f"pipeline: expected auto, cpu or dali, got {pipeline!r}")
    why_not_dali = ["this version has no DALI pipeline"]
    if pipeline == "dali":
        raise NotImplementedError(
            f"pipeline dali cannot run: {'; '.join(why_not_dali)}. Use --pipeline cpu"
        )
    chosen = cpu_decode.NAME
    if pipeline == "auto" and train:
        logger.info("pipeline: %s; not dali: %s", chosen, "; ".join(why_not_dali))
    return chosen


def _all_bad(failures: list[Failure]) -> str:
    reasons = {failure.path: f"{failure.kind}, {failure.reason}" for failure in failures}
    lines = [f"  {path}: {reason}" for path, reason in list(reasons.items())[:10]]
    return (
        f"no substitute was found: {len(reasons)} videos in a row cannot be used\n"
        + "\n".join(lines)
        + "\nCheck the data folder with `python -m timefast.scan`."
    )
