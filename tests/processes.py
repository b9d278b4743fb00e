"""Several processes of one training run, forked from the tests: torch is imported once."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

from timefast.train import main

SECONDS = 180  # how long a run of these tests may take on a busy machine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count, argv, log: Path, prepare=lambda rank: None):
    """Start `main(argv)` in `count` processes as torchrun would; `prepare(rank)` runs first.
    What process r writes to standard error is in `log`.r."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    started = [
        context.Process(target=_run, args=(rank, count, port, argv, log, prepare))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    return started


def wait(started):
    """Exit codes; a process that is still there after SECONDS is killed, its code is -9."""
    for process in started:
        process.join(SECONDS)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def run(count, argv, log: Path, prepare=lambda rank: None):
    return wait(start(count, argv, log, prepare))


def said(log: Path, rank: int) -> str:
    return Path(f"{log}.{rank}").read_text()


def _run(rank, count, port, argv, log, prepare):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    file = Path(f"{log}.{rank}").open("w", buffering=1)  # noqa: SIM115, lives as long as the process
    os.dup2(file.fileno(), 2)
    sys.stderr = file
    torch.set_num_threads(1)  # a pool of the parent's threads is not in this process
    prepare(rank)
    sys.exit(main([str(a) for a in argv]))
