"""Before anything imports Triton: without a GPU its kernels run in the interpreter. With several
test processes (`pytest -n auto`) each, and what it starts, takes its share of the cores."""

import os

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    share = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

import torch  # noqa: E402  (reads that number when it is imported)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    promised = os.environ.get("TIMEFAST_EXPECT_GPU") == "1"
    for item in items:
        if item.get_closest_marker("gpu") is None:
            continue
        if promised:
            raise pytest.UsageError("TIMEFAST_EXPECT_GPU=1, but torch sees no CUDA device")
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder of one training step on twelve videos; not to be written to."""
    from timefast.demo_data import write_demo_data
    from timefast.train import main

    root = tmp_path_factory.mktemp("tiny")
    data = write_demo_data(root / "data", train_per_class=1, val_per_class=1)
    flags = ["--data", str(data), "--out", str(root / "run"), "--device", "cpu", "--workers", "0"]
    small = ["--depth", "2", "--dim", "32", "--heads", "2", "--shuffles", "1"]
    assert main([*flags, *small, "--recipe", "demo", "--max-steps", "1"]) == 0
    return root / "run"
