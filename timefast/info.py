"""What runs here, and what is missing: `python -m timefast.info`.

Lists which implementation of each op can run and why another cannot, versions, devices, and for
everything optional that is absent the command that installs it. Nothing that is missing or broken
makes this command fail: finding that out is what it is for.
"""

import argparse
import ctypes
import ctypes.util
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from timefast import __version__
from timefast.cache import cache_folder
from timefast.errors import InputError
from timefast.log import to_console


@dataclass(frozen=True)
class Package:
    """Something that may be installed; `install` is what to type when it is not."""

    module: str
    distributions: tuple[str, ...]  # names under which it is published
    needed_for: str
    install: str


_PROJECT = "pip install -e ."
PACKAGES = (
    Package("torch", ("torch",), "everything", _PROJECT),
    Package("triton", ("triton",), "fused kernels on a GPU", 'pip install "triton>=3.6"'),
    Package("numpy", ("numpy",), "everything", _PROJECT),
    Package("einops", ("einops",), "everything", _PROJECT),
    Package("av", ("av",), "reading videos on the CPU, the demo data set", _PROJECT),
    Package(
        "cv2",
        ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless"),
        "fast flow labels on the CPU, the demo data set",
        _PROJECT,
    ),
    Package("safetensors", ("safetensors",), "checkpoints", _PROJECT),
    Package("huggingface_hub", ("huggingface_hub",), "ImageNet weights", _PROJECT),
    Package("PIL", ("pillow",), "pictures in reports", _PROJECT),
    Package("jinja2", ("jinja2",), "reports", _PROJECT),
    Package("matplotlib", ("matplotlib",), "figures of probe, gradcam, confidence", _PROJECT),
    Package(
        "nvidia.dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "reading videos on the GPU",
        'pip install -e ".[dali]"',
    ),
    Package(
        "tensorboard", ("tensorboard",), "curves in TensorBoard", 'pip install -e ".[tensorboard]"'
    ),
    Package("onnx", ("onnx",), "timefast.export to ONNX", 'pip install -e ".[onnx]"'),
    Package("onnxscript", ("onnxscript",), "timefast.export to ONNX", 'pip install -e ".[onnx]"'),
    Package("onnxruntime", ("onnxruntime",), "checking exported ONNX", 'pip install -e ".[onnx]"'),
    Package("xformers", ("xformers",), "a rival in bench/, nothing else", "pip install xformers"),
    Package(
        "transformers",
        ("transformers",),
        "tests of timefast.patch on the Hugging Face port",
        'pip install -e ".[test]"',
    ),
)


def collect() -> dict[str, Any]:
    """Everything the command reports, as plain values."""
    packages = [_package(package) for package in PACKAGES]
    gpus, why_no_gpu = _gpus()
    driver = _driver()
    return {
        "timefast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cuda": _torch_cuda(),
        "driver": driver,
        "gpus": gpus,
        "why_no_gpu": why_no_gpu,
        "libnvcuvid": _loads("nvcuvid"),
        "packages": packages,
        "ops": _ops("cuda" if gpus else "cpu"),
        "missing": _missing(packages, driver),
        "cache": str(cache_folder()),
        "impl_variable": os.environ.get("TIMEFAST_IMPL"),
    }


def _package(package: Package) -> dict[str, Any]:
    """Version and, if it does not import, the reason.

    A package that is installed but broken raises whatever it likes, so everything is caught here.
    """
    found: dict[str, Any] = {**asdict(package), "version": None, "problem": None}
    for name in package.distributions:
        try:
            found["version"] = metadata.version(name)
            break
        except metadata.PackageNotFoundError:
            continue
    try:
        module = importlib.import_module(package.module)
        found["version"] = found["version"] or str(getattr(module, "__version__", "unknown"))
    except ModuleNotFoundError as error:
        if found["version"] is not None or not package.module.startswith(error.name or " "):
            found["problem"] = str(error)
    except Exception as error:
        found["problem"] = f"{type(error).__name__}: {error}"
    return found


def _torch_cuda() -> str | None:
    """The CUDA version torch was built with."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    try:
        import torch
    except ImportError as error:
        return [], str(error)
    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return [], "torch finds no usable CUDA device (no GPU, no driver, or hidden from us)"
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append({
            "name": about.name,
            "compute_capability": f"{about.major}.{about.minor}",
            "memory_gib": round(about.total_memory / 2**30, 1),
        })  # fmt: skip
    return found, None


def _driver() -> str | None:
    """Version of the NVIDIA kernel driver, None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else text.splitlines()[0]


def _loads(name: str) -> bool:
    for candidate in (f"lib{name}.so.1", ctypes.util.find_library(name)):
        if candidate is None:
            continue
        try:
            ctypes.CDLL(candidate)
        except OSError:
            continue
        return True
    return False


def _ops(device: str) -> list[dict[str, Any]]:
    """Per op what "auto" takes on this device, and of each implementation why it cannot run."""
    try:
        from timefast import ops  # noqa: F401 (registers the ops)
        from timefast.kernels.op import OPS, implementations
    except ImportError:
        return []
    found = []
    for name, op in sorted(OPS.items()):
        reasons = implementations(name)
        auto = next(
            (k for k, i in op.all_impls().items() if device in i.auto and not reasons[k]), None
        )
        found.append({"op": name, "auto": auto, "implementations": reasons})
    return found


def _why_no_native() -> str | None:
    """Why the attention loops in C cannot be compiled or loaded here."""
    try:
        from timefast.kernels import native
    except ImportError:
        return None  # torch is missing, which is said elsewhere
    return native.why_not()


def _missing(packages: Sequence[dict[str, Any]], driver: str | None) -> list[dict[str, str]]:
    """What could be added here: what it would give, how to get it."""
    missing = [
        {"what": p["distributions"][0], "for": p["needed_for"], "get": p["install"]}
        for p in packages
        if p["version"] is None
    ]
    if reason := _why_no_native():
        missing.append({
            "what": "C compiler, OpenMP", "for": "fast attention on the CPU",
            "get": f"Debian, Ubuntu: apt-get install gcc, or set CC; now: {reason}",
        })  # fmt: skip
    if driver is not None:
        if _torch_cuda() is None:
            missing.append({
                "what": "torch with CUDA", "for": "training on the GPU of this machine",
                "get": "pip install --force-reinstall torch (the PyPI build)",
            })  # fmt: skip
        if not _loads("nvcuvid"):
            missing.append({
                "what": "libnvcuvid", "for": "reading videos on the GPU",
                "get": "in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility,video",
            })  # fmt: skip
    return missing


def as_text(info: dict[str, Any]) -> str:
    """The report for people: ops first, then machine, packages, what is missing."""
    device = "GPU" if info["gpus"] else "CPU"
    lines = [f"timefast {info['timefast']}: what runs on the {device} of this machine", ""]
    for op in info["ops"]:
        also = [k for k, why in op["implementations"].items() if not why and k != op["auto"]]
        choice = op["auto"] or "nothing"
        lines.append(f"  {op['op']:<22}{choice:<12}" + (f"also {', '.join(also)}" if also else ""))
        lines += [
            f"  {'':<22}not {name}: {reason}"
            for name, reasons in op["implementations"].items()
            for reason in reasons
        ]
    if not info["ops"]:
        lines.append("  the ops cannot be imported; see the packages below")
    if info["impl_variable"]:
        lines.append(f'  TIMEFAST_IMPL={info["impl_variable"]} replaces "auto"')

    lines += ["", "machine"]
    for gpu in info["gpus"]:
        lines.append(
            f"  GPU             {gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['memory_gib']} GiB"
        )
    if not info["gpus"]:
        lines.append(f"  GPU             none: {info['why_no_gpu']}")
    lines += [
        f"  CPU cores       {info['cpu_cores']}",
        f"  Python          {info['python']} on {info['platform']}",
        f"  CUDA of torch   {info['cuda'] or 'none'}",
        f"  NVIDIA driver   {info['driver'] or 'none'}",
        f"  libnvcuvid      {'found' if info['libnvcuvid'] else 'not found'} (GPU video decoder)",
        f"  cache folder    {info['cache']}",
    ]

    lines += ["", "packages"]
    for package in info["packages"]:
        state = package["version"] or "not installed"
        lines.append(f"  {package['distributions'][0]:<24}{state:<16}{package['needed_for']}")
        if package["problem"]:
            problem = package["problem"].splitlines()[0]
            lines.append(f"  {'':<24}does not import: {problem}")

    lines += ["", "missing"]
    for entry in info["missing"]:
        lines.append(f"  {entry['what']:<24}{entry['get']}    ({entry['for']})")
    if not info["missing"]:
        lines.append("  nothing")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m timefast.info",
        description="Show which op runs with which implementation here, versions, and what is "
        "missing with the command that installs it.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--pipeline",
        type=Path,
        metavar="DIR",
        help="also measure which decoding pipeline feeds the model, on the data set in DIR",
    )
    arguments = parser.parse_args(argv)
    info = collect()
    text = as_text(info)
    if arguments.pipeline is not None:
        from timefast import feeding

        to_console()
        try:
            info["pipeline"] = feeding.feeding(arguments.pipeline)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        text += "\n" + feeding.as_text(info["pipeline"])
    sys.stdout.write((json.dumps(info, indent=2) if arguments.json else text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
