"""From the records of a data set to batches of clips, the same whatever decodes them.

Every choice is a function of (seed, epoch, sample): the number of workers, a restart, and where in
an epoch it happens change no batch. A worker makes whole batches, one job at a time.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch

from timefast.data.augment import parse_rand_augment
from timefast.data.batch import Batch, ClipSpec, Failure, VideoSet
from timefast.device import cores_of_this_process
from timefast.errors import InputError
from timefast.pipelines import cpu_decode, dali_gpu
from timefast.pipelines.labels import clip_labels
from timefast.pipelines.manifest import Additions
from timefast.pipelines.samples import Job, Samples
from timefast.pipelines.workers import Workers

logger = logging.getLogger("timefast")

MOST_WORKERS = 16
MOST_DALI_THREADS = 8
# Cores for each GPU from which on "auto" leaves the GPU to the model. An estimate: a core makes ten
# to twenty clips a second (bench_pipelines.py), TimeSformer-B with TIME takes fifty to a hundred on
# a large GPU. `timefast.info --pipeline` measures it.
ENOUGH_CORES = 8
BATCHES_AHEAD = 2
T = TypeVar("T")


class ClipLoader:
    """Batches of clips of a split.

    In training an epoch visits the videos in a random order, one clip each, the last batch may be
    short, and a bad video is replaced by the next good one in the order (up to `max_bad_in_a_row`
    bad ones are passed over). In evaluation each video gives views[0] temporal x views[1] spatial
    clips (1 or 3), which stand together; the order is that of the records and a bad video is
    absent. Either way it is in `Batch.failures`.

    `batch_size` counts videos. Of every batch process `rank` of `world_size` gets its share, a
    stretch of consecutive videos as long as the others' or one shorter, which may be empty; all
    processes together get the batches that one alone would get. `workers` is a number of decoding
    processes (0: none; None: from the number of cores). Batches come out on `device`; flow labels
    are made in the workers, or on the device if that is a GPU. `pipeline` says what decodes; the
    attribute of that name says what was chosen.

    Training adds what it finds out about files to the manifest of the data folder (process 0 does).

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
        rank: int = 0,
        world_size: int = 1,
    ):
        _check(spec, batch_size, views, train)
        if workers is not None and workers < 0:
            raise InputError(f"workers: expected 0 or more, got {workers}")
        self.videos = videos
        self.batch_size = batch_size
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        cores = cores_of_this_process()
        if workers is None:
            # on a CPU the model needs cores as well
            workers = min(cores // 2 if self.device.type == "cpu" else cores - 1, MOST_WORKERS)
        self.workers = min(workers, len(self))
        self._train, self._spec = train, spec
        self._rank, self._world_size = rank, world_size
        on_dali = _choose(pipeline, self.device, cores, said=train)
        self._labels_here = train and not on_dali and self.device.type != "cpu"
        self._samples = Samples(
            videos,
            spec,
            train=train,
            seed=seed,
            views=views,
            tries=max_bad_in_a_row if train else 1,
            labels=train and not on_dali and self.device.type == "cpu",
            dali=dali_gpu.back_end(self.device) if on_dali else None,
        )
        self._dali = None
        self.pipeline = cpu_decode.NAME
        if on_dali:
            threads = min(max(1, cores - self.workers), MOST_DALI_THREADS)
            self._dali = dali_gpu.Dali(self._samples, self.device, threads, labels=train)
            self.pipeline = dali_gpu.full_name(self.device)
        self._manifest = Additions(videos) if train and rank == 0 else None
        self._pool: Workers | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.videos.records) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from number `start` on.

        Raises InputError if so many videos in a row are bad that none is substituted, RunError if
        decoding processes end again and again.
        """
        jobs = self._jobs(epoch, start)
        for (_, first, end), batch in zip(jobs, self._make(jobs), strict=True):
            if self._manifest is not None:
                self._manifest.add(batch.found)
            if self._train and len(batch.label) < end - first:
                raise InputError(_all_bad(batch.failures))
            batch = batch.to(self.device)
            if self._labels_here:
                batch.flow_label = clip_labels(batch.video, self._spec)
            yield batch

    def close(self) -> None:
        """End the workers; a later call of `batches` starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._manifest is not None:
            self._manifest.close()

    def _jobs(self, epoch: int, start: int) -> list[Job]:
        """The share of this process of each batch, as positions in the epoch's order."""
        jobs, videos = [], len(self.videos.records)
        for first in range(start * self.batch_size, videos, self.batch_size):
            size = min(self.batch_size, videos - first)
            begin, end = (size * r // self._world_size for r in (self._rank, self._rank + 1))
            jobs.append((epoch, first + begin, first + end))
        return jobs

    def _make(self, jobs: list[Job]) -> Iterator[Batch]:
        """The batches of these jobs; for a GPU a thread makes them ready while the last is used."""
        if self.workers and self._pool is None:
            self._pool = Workers(self._samples, self.workers)
        made: Iterator[Any] = map(self._samples.make, jobs)
        if self._pool is not None:
            made = self._pool.batches(jobs)
        if self._dali is not None:
            for batch in _ahead(map(self._dali.batch, made)):
                yield batch.used_on(self.device)
        elif self.device.type == "cuda":
            yield from _ahead(batch.pin_memory() for batch in made)
        else:
            yield from made


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, made by one thread, up to BATCHES_AHEAD before they are asked for."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = deque(thread.submit(next, items, None) for _ in range(BATCHES_AHEAD))
        while (item := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, items, None))
            yield item


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


def _choose(pipeline: str, device: torch.device, cores: int, *, said: bool) -> bool:
    """Whether DALI decodes; NotImplementedError with reasons if it is asked for and cannot."""
    if pipeline not in ("auto", "cpu", "dali"):
        raise ValueError(f"pipeline: expected auto, cpu or dali, got {pipeline!r}")
    if pipeline == "cpu":
        return False
    if pipeline == "dali":
        if reasons := dali_gpu.why_not(device):
            raise NotImplementedError(
                f"pipeline dali cannot run: {'; '.join(reasons)}. Or use --pipeline cpu"
            )
        if said:
            logger.info("pipeline: %s", dali_gpu.full_name(device))
        return True
    if device.type != "cuda":
        reasons = ["there is no GPU to decode on"]
    elif cores >= ENOUGH_CORES:
        reasons = [
            f"{cores} cores for this GPU are enough; `python -m timefast.info --pipeline DIR` "
            "compares the two on your videos"
        ]
    else:
        reasons = dali_gpu.why_not(device)
    if said and reasons:
        logger.info("pipeline: %s; not dali: %s", cpu_decode.NAME, "; ".join(reasons))
    elif said:
        logger.info(
            "pipeline: %s, for there are %d cores for this GPU", dali_gpu.full_name(device), cores
        )
    return not reasons


def _all_bad(failures: list[Failure]) -> str:
    reasons = {failure.path: f"{failure.kind}, {failure.reason}" for failure in failures}
    lines = [f"  {path}: {reason}" for path, reason in list(reasons.items())[:10]]
    return (
        f"no substitute was found: {len(reasons)} videos in a row cannot be used\n"
        + "\n".join(lines)
        + "\nCheck the data folder with `python -m timefast.scan`."
    )
