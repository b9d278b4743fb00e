"""Processes that make the batches of a loader, and are watched: one that hangs on a video is ended
and the video is bad from then on; one that was killed is replaced and its batches are made again.
"""

import contextlib
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch
import torch.multiprocessing  # noqa: F401 (lets tensors travel in shared memory)

from timefast.data.batch import Failure
from timefast.errors import RunError
from timefast.kernels.farneback import opencv_without_threads
from timefast.pipelines import cpu_decode

logger = logging.getLogger("timefast")

AHEAD = 2  # jobs that a worker is given at a time
MOST_RESTARTS = 5  # without one batch made in between
LOOK_EVERY_S = 1.0
_FORK = multiprocessing.get_context("fork")


class Work(Protocol):
    """What the processes do: a job at a time, of videos that have numbers."""

    labels: bool  # whether OpenCV is used
    bad: dict[int, Failure]  # videos not to be tried
    at: Any  # the number of the video being worked on, or -1, and since when

    def make(self, job: Any) -> Any: ...

    def failure(self, number: int, kind: str, reason: str) -> Failure: ...


class Workers:
    """Makes the batches of jobs in `count` processes and hands them out in order."""

    def __init__(self, work: Work, count: int):
        self._work = work  # whose `bad` each worker is told of
        # what a decoder that can still look at the clock gives itself, and some time to say so
        self._patience = 1.5 * cpu_decode.TIMEOUT_S
        self._run = _FORK.RawValue("q", 0)  # jobs of earlier runs are not worth doing
        self._crashed: set[int] = set()
        self._restarts = 0
        self._closed = False
        # made here, so that all use it and this process removes it at its end: the sockets over
        # which tensors come lie in it, and a worker that is killed removes nothing
        multiprocessing.util.get_temp_dir()
        self._workers = [self._start() for _ in range(count)]
        multiprocessing.util.Finalize(self, _end, (self._workers,), exitpriority=20)

    def batches(self, jobs: Sequence[Any]) -> Iterator[Any]:
        """The batch of each job, in their order; at most `AHEAD` a worker are begun before they are
        asked for. Raises RunError if the workers cannot be kept alive."""
        self._run.value += 1
        for worker in self._workers:
            worker.jobs.clear()
        ready: dict[int, Any] = {}
        given = 0
        for number in range(len(jobs)):
            while number not in ready:
                if self._closed:
                    return
                while given < min(len(jobs), number + AHEAD * len(self._workers)):
                    worker = min(self._workers, key=lambda w: len(w.jobs))
                    if len(worker.jobs) == AHEAD:
                        break
                    self._give(worker, given, jobs[given])
                    given += 1
                self._collect(ready)
            batch = ready.pop(number)
            if isinstance(batch, str):
                raise RuntimeError(f"in a decoding process:\n{batch}")
            yield batch

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    def close(self) -> None:
        self._closed = True  # for a thread that is still asking for batches
        _end(self._workers)

    def _start(self) -> "_Worker":
        return _Worker(self._work, self._run)

    def _give(self, worker: "_Worker", number: int, job: Any) -> None:
        worker.jobs.append((number, job))
        # only what is new: a long message would wait for a worker that waits to be heard
        bad = self._work.bad
        news = {sample: bad[sample] for sample in bad.keys() - worker.told}
        worker.told |= news.keys()
        with contextlib.suppress(OSError):  # it has ended; the next look at it says why
            worker.pipe.send((self._run.value, number, job, news))

    def _collect(self, ready: dict[int, Any]) -> None:
        """Take what is there, or wait a little; replace who has ended or hangs."""
        listening = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(listening), LOOK_EVERY_S):
            worker = listening[pipe]  # type: ignore[index]
            try:
                run, number, batch = worker.pipe.recv()
            except (OSError, EOFError, RuntimeError):  # what it was sending went with it
                self._replace(worker, "ended")
                continue
            if run == self._run.value:
                worker.jobs.popleft()
                ready[number] = batch
                self._restarts = 0
        for worker in list(self._workers):
            if not worker.process.is_alive() and not worker.pipe.poll():
                self._replace(worker, "ended")
            elif worker.sample() >= 0 and time.monotonic() - worker.at[1] > self._patience:
                self._replace(worker, "hangs")

    def _replace(self, worker: "_Worker", how: str) -> None:
        if self._closed:
            return
        sample, pid = worker.sample(), worker.process.pid
        worker.process.kill()
        worker.process.join()
        path = self._work.failure(sample, "", "").path if sample >= 0 else "no video"
        code = worker.process.exitcode
        if how == "hangs":
            reason = f"took more than {self._patience:.0f} s; its process was ended"
            self._refuse(sample, "timeout", reason)
        elif sample in self._crashed:
            self._refuse(sample, "crash", f"its process ended twice, exit code {code}")
        elif sample >= 0:
            self._crashed.add(sample)
        logger.warning("decoding process %s %s (exit code %s) at %s", pid, how, code, path)
        self._restarts += 1
        if self._restarts > MOST_RESTARTS:
            raise RunError(
                f"{self._restarts} decoding processes in a row ended before they had made a batch, "
                f"the last with exit code {code} at {path}. Exit code -9 usually means that there "
                "was no memory left: use fewer --workers, or --workers 0 to see the error itself"
            )
        new = self._start()
        self._workers[self._workers.index(worker)] = new
        for number, job in worker.jobs:
            self._give(new, number, job)

    def _refuse(self, sample: int, kind: str, reason: str) -> None:
        self._work.bad[sample] = self._work.failure(sample, kind, reason)


class _Worker:
    """A process with the jobs it was given, and the video it is at."""

    def __init__(self, work: Work, run: Any):
        self.jobs: deque[tuple[int, Any]] = deque()
        self.told = set(work.bad)  # it begins with a copy of what is known to be bad
        self.at = _FORK.RawArray("d", [-1.0, 0.0])
        self.pipe, theirs = _FORK.Pipe()
        self.process = _FORK.Process(
            target=_serve, args=(theirs, self.pipe, work, self.at, run), daemon=True
        )
        self.process.start()
        theirs.close()

    def sample(self) -> int:
        return int(self.at[0])


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.pipe.close()
    workers.clear()


def _serve(pipe: Connection, theirs: Connection, work: Work, at: Any, run: Any) -> None:
    theirs.close()
    parent = os.getppid()
    # the main process decides what a signal means, and ends its workers
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    if work.labels:
        opencv_without_threads()
    work.at = at
    while True:
        while not pipe.poll(LOOK_EVERY_S):
            if os.getppid() != parent:
                return
        try:
            this_run, number, job, news = pipe.recv()
            work.bad |= news
            result: Any = None
            if this_run == run.value:
                try:
                    result = work.make(job)
                except Exception:
                    result = traceback.format_exc()
            try:
                pipe.send((this_run, number, result))
            except RuntimeError:  # torch, when there is no room for shared memory
                pipe.send((this_run, number, traceback.format_exc()))
        except (EOFError, ConnectionError):  # nobody is there any more
            return
