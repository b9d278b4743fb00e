"""The kernels compile for GPUs that need not be here, and fit them.

A child process compiles: one that interprets kernels, as the tests do without a GPU, cannot.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.compile_table import SHARED_LIMIT, TARGETS, _page
from timefast.kernels.tiles import find, table

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module")
def committed():
    return json.loads((ROOT / "docs/kernels/compiled.json").read_text("utf-8"))


def compile_in_child(*flags):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.compile_table", "--few", *flags]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "flags",
    [("--only", "space"), ("--only", "add"), pytest.param((), marks=pytest.mark.slow)],
    ids=["space", "add", "all ops"],
)
def test_the_papers_shapes_fit_an_a100_and_use_its_tensor_cores_and_wide_loads(flags):
    rows = compile_in_child(*flags)
    assert {r["cc"] for r in rows} == {80, 90}
    for r in rows:
        assert r["spills"] == r["stack"] == 0, r
        assert r["shared"] <= SHARED_LIMIT[80], r
        if not r["kernel"].startswith("add"):  # which has no products
            assert {"mma.sync", "wgmma"} & set(r["features"]), r
        assert "128-bit loads" in r["features"] and "atomics" not in r["features"], r
        if r["cc"] == 90 and r["kernel"].startswith("space"):
            assert "wgmma" in r["features"], r


def test_no_launch_parameters_spill_or_ask_for_more_memory_than_their_gpu_has(committed):
    for r in committed:
        assert r["spills"] == r["stack"] == 0, r
        assert r["shared"] <= SHARED_LIMIT[r["cc"]], r


def test_the_committed_readings_are_those_of_the_launch_parameters(committed):
    for r in committed:
        now = find(table(TARGETS[r["cc"]]), r["entry"], DTYPES[r["dtype"]], r["width"], r["length"])
        assert r["params"] == now, f"{r['entry']}: run python -m bench.compile_table"


def test_every_row_of_launch_parameters_has_been_compiled(committed):
    read = {(r["cc"], r["entry"], r["dtype"], json.dumps(r["params"])) for r in committed}
    for cc, name in TARGETS.items():
        for entry, rows in table(name).items():
            for row in rows if isinstance(rows, list) else []:
                params = {k: v for k, v in row.items() if k not in ("dtype", "width", "length")}
                dtype = "float32" if row["dtype"] == "float" else "bfloat16"
                assert (cc, entry, dtype, json.dumps(params)) in read, (entry, row)


def test_the_page_shows_the_committed_readings(committed):
    assert (ROOT / "docs/kernels/compiled.md").read_text("utf-8") == _page(committed)
