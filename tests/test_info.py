"""`python -m timefast.info` says what runs here and never fails because something is absent."""

import builtins
import importlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from timefast import info

OPTIONAL = {
    "triton", "av", "cv2", "safetensors", "huggingface_hub", "PIL", "jinja2", "matplotlib",
    "nvidia", "tensorboard", "xformers", "transformers",
}  # fmt: skip


@pytest.fixture
def bare(monkeypatch):
    """A machine on which nothing but torch, numpy and einops is installed."""
    real_module, real_version = importlib.import_module, metadata.version
    real_module("cv2")  # imports itself by that function, the first time

    def no_module(name, *args):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
        return real_module(name, *args)

    def no_version(name):
        if name not in ("torch", "numpy", "einops"):
            raise metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(importlib, "import_module", no_module)
    monkeypatch.setattr(metadata, "version", no_version)


def test_info_names_an_implementation_for_every_public_op():
    from timefast import ops

    found = {op["op"]: op for op in info.collect()["ops"]}
    for name in ("time_attention", "space_attention", "farneback", "flow_labels"):
        assert found[name]["implementations"] == ops.implementations(name)
        assert found[name]["implementations"][found[name]["auto"]] == []


def test_refused_implementations_come_with_their_reason():
    report = info.collect()
    report["ops"] = [{"op": "some_op", "auto": "cpu", "implementations": {
        "triton": ["this machine has no CUDA device"], "cpu": [], "reference": [],
    }}]  # fmt: skip
    text = info.as_text(report)
    assert "not triton: this machine has no CUDA device" in text
    assert "also reference" in text


def test_info_survives_a_machine_without_optional_packages(bare):
    report = info.collect()
    missing = {entry["what"]: entry["get"] for entry in report["missing"]}
    assert missing["nvidia-dali-cuda130"] == 'pip install -e ".[dali]"'
    assert {"av", "opencv-python-headless", "triton", "xformers"} <= set(missing)
    assert all(p["problem"] is None for p in report["packages"])
    assert "not installed" in info.as_text(report)


def test_installed_but_broken_package_is_reported_not_raised(monkeypatch):
    real = importlib.import_module

    def broken(name, *args):
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file")
        if name == "av":
            raise RuntimeError("compiled for another FFmpeg")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", broken)
    text = info.as_text(info.collect())
    assert "does not import: ImportError: libGL.so.1" in text
    assert "does not import: RuntimeError: compiled for another FFmpeg" in text


def test_every_extra_that_info_names_exists():
    setup = (Path(__file__).parent.parent / "setup.py").read_text(encoding="utf-8")
    for package in info.PACKAGES:
        if '".[' in package.install:
            extra = package.install.split("[")[1].split("]")[0]
            assert f'"{extra}": [' in setup
            assert package.distributions[0] in setup


def test_info_survives_ops_that_do_not_import(monkeypatch):
    real = builtins.__import__

    def refuse(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "timefast" and fromlist and "ops" in fromlist:
            raise ImportError("no ops")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", refuse)
    report = info.collect()
    assert report["ops"] == []
    assert "cannot be imported" in info.as_text(report)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert info.collect()["cache"] == str(tmp_path / "timefast")


def test_json_is_one_object():
    done = subprocess.run(
        [sys.executable, "-m", "timefast.info", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["timefast"] == info.__version__
    assert {"ops", "packages", "missing", "gpus", "driver", "libnvcuvid"} <= set(report)


def test_pipelines_are_compared_on_the_users_videos(tmp_path, capsys, monkeypatch):
    from timefast import feeding
    from timefast.data.batch import ClipSpec
    from timefast.demo_data import write_demo_data

    root = write_demo_data(tmp_path / "set", train_per_class=1, val_per_class=1, workers=1)
    spec = ClipSpec(
        crop=64, short_side=(64, 76), test_short_side=64, rand_augment=None, flow_rule=None
    )
    found = feeding.feeding(root, spec=spec, seconds=0.1, model=lambda *_: 2.0)
    assert found["pipelines"]["cpu"]["clips_per_s"] > 2 and not found["pipelines"]["cpu"]["bad"]
    dali = found["pipelines"]["dali"]
    assert "pip install" in dali.get("problem", "") or dali["clips_per_s"] > 0
    assert "take --pipeline cpu: it makes clips faster" in feeding.as_text(found)
    found |= {"model": 1e9, "pipelines": {"cpu": {"problem": "no"}, "dali": {
        "name": "dali", "workers": 2, "clips_per_s": 5e8, "bad": 1,
    }}}  # fmt: skip
    text = feeding.as_text(found)
    assert "take --pipeline dali, the faster one; the model will wait for it 50%" in text
    assert "1 videos could not be used" in text
    assert info.main(["--pipeline", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setattr(feeding, "feeding", lambda root: found)
    assert info.main(["--pipeline", str(root)]) == 0
    assert "who feeds the model" in capsys.readouterr().out
