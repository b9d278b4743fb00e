"""Before anything imports Triton: without a GPU its kernels run in the interpreter."""

import os

import pytest
import torch

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
