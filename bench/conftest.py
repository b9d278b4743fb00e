"""What every benchmark shares: a clock that waits for the device, the gate on accuracy, and the
writer of result files.

    pytest bench/ --benchmark-only                    measure and print
    pytest bench/ --benchmark-only --save-results     also write bench/results/<what>_<device>_
                                                      <yyyy-mm-dd>_<commit>.json, one per module
"""

import ctypes
import datetime
import functools
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).with_name("results")
ON_GPU = torch.cuda.is_available()
# Largest relative Frobenius error against the float32 reference at which a time may be recorded.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def device_clock() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """measure(run, error=..., limit=..., **extra_info): time `run` unless its results are wrong."""

    def measure(run: Callable[[], Any], *, error: float, limit: float, **info: Any) -> None:
        assert error <= limit, f"error {error:.1e} exceeds {limit:.1e}: no time is recorded"
        info["peak_memory"] = None
        if ON_GPU:
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            info["peak_memory"] = torch.cuda.max_memory_allocated() - before
        benchmark.extra_info.update(**info, error=error)
        start = device_clock()
        run()
        quick = device_clock() - start < 0.02  # a CPU's clock rate wanders: many short rounds
        rounds, iterations = (30, 10) if ON_GPU else (75 if quick else 15, 1)
        benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=3)

    return measure


def pytest_configure() -> None:
    """Keep freed memory in the process, as it stays in a training run, where every step frees and
    takes the same sizes. Otherwise small measurements time the page faults of malloc's last trim.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results", action="store_true", help="write the measurements to bench/results/"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=device_clock))


def pytest_sessionfinish(session: pytest.Session) -> None:
    measured = getattr(session.config, "_benchmarksession", None)
    if measured is None or not session.config.getoption("--save-results"):
        return
    files = defaultdict(list)
    for bench in measured.benchmarks:
        if not bench.has_error:
            what = Path(bench.fullname.partition("::")[0]).stem.removeprefix("bench_")
            files[what].append(_record(bench))
    for what, records in files.items():
        device = re.sub(r"[^a-z0-9]+", "-", records[0]["device"].lower()).strip("-")
        date, commit = datetime.date.today().isoformat(), records[0]["commit"]
        path = RESULTS / f"{what}_{device}_{date}_{commit}.json"
        path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def _record(bench: Any) -> dict[str, Any]:
    times = sorted(bench.stats.data)  # seconds
    at = (len(times) - 1) / 10
    return {
        **bench.extra_info,
        "median": times[round(5 * at)],
        "p20": times[round(2 * at)],
        "p80": times[round(8 * at)],
        **environment(),
    }


@functools.cache
def environment() -> dict[str, Any]:
    """Device, driver, versions and commit, the same for every record of a session."""
    driver = None
    if ON_GPU:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = _output(*query).splitlines()[0]
    versions = {}
    for package in (
        "torch",
        "triton",
        "xformers",
        "nvidia-dali-cuda130",
        "opencv-python-headless",
        "av",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else _processor(),
        "driver": driver,
        "versions": versions,
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        # result files of the same session are no change of what is measured
        "dirty": bool(_output("git", "status", "--porcelain", ":/", ":(exclude,top)bench/results")),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _output(*command: str) -> str:
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip()
