"""A model as one file for other runtimes: `python -m timefast.export SOURCE DEST`.

DEST ends in .pt2 (torch.export: torch.export.load(DEST).module()) or .onnx. The program takes
normalised clips [clips, 3, frames, height, width] float32, any number of them, and gives class
logits [clips, classes]. Frames, pixels, normalisation and class names stand in the file. The ops
are their plain PyTorch definitions, so it runs wherever its runtime does. What was written is read
again and compared with the model.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timefast.config import Parser
from timefast.errors import InputError, RunError
from timefast.eval.source import (
    Source,
    add_model_flags,
    class_names,
    exit_code,
    open_source,
    origin,
    surroundings,
)
from timefast.log import to_console

logger = logging.getLogger("timefast")
MOST_DIFFERENCE = 1e-4  # of logits, against the largest: float32 in another order of sums


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m timefast.export", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint")
    parser.add_argument("dest", type=Path, help="file to write, .pt2 or .onnx")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="class names to put into the file"
    )
    add_model_flags(parser)
    args = parser.parse_args(argv)
    to_console()
    args.device, args.precision, args.impl = "cpu", "fp32", "reference"
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    dest = args.dest
    if dest.suffix not in WRITERS:
        raise InputError(f"{dest}: expected a name that ends in {' or '.join(WRITERS)}")
    if dest.exists():
        raise InputError(f"{dest} exists; nothing is overwritten, name another place")
    if not dest.parent.is_dir():
        raise InputError(f"{dest}: there is no folder {dest.parent}")
    if dest.suffix == ".onnx":
        _check_onnx()
    part = dest.with_name(f".part-{dest.name}")  # it has its name when it is whole and checked
    try:
        part.touch()  # says so at once where nothing can be written
        part.unlink()
    except OSError as error:
        raise InputError(f"{dest}: cannot be written ({error.strerror})") from error
    source = open_source(args.source, args)
    video = torch.randn(2, 3, source.spec.frames, source.spec.crop, source.spec.crop)
    about = json.dumps(description(source, args.labels))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters speak of their own insides
            WRITERS[dest.suffix](source.model, video, part, about)
        difference = _difference(source.model, part, video.shape)
        if difference is not None and not difference <= MOST_DIFFERENCE:
            raise RunError(
                f"{dest}: what was exported does not compute what the model does (logits "
                f"{difference:.1e} apart); nothing is kept. Try the other format, or another "
                "version of torch"
            )
        os.replace(part, dest)
    except OSError as error:
        raise InputError(f"{dest}: cannot be written ({error.strerror})") from error
    except (InputError, RunError):
        raise
    except Exception as error:  # of the exporters, which have no common class
        first = (str(error).splitlines() or [""])[0]
        raise RunError(
            f"{dest}: torch {torch.__version__} cannot export this model ({type(error).__name__}: "
            f"{first}); nothing is kept. Try the other format, or another version of torch"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    shape = ", ".join(["clips", *map(str, video.shape[1:])])
    print(f"{dest}: video [{shape}] float32 -> logits [clips, {source.model.num_classes}]")
    if difference is None:
        print('not checked: onnxruntime is not installed; `pip install -e ".[onnx]"` provides it')
        return 0
    print(f"largest difference from the model, against its largest logit: {difference:.1e}")
    return 0


def description(source: Source, labels: Path | None) -> dict[str, Any]:
    """What stands in the file beside the program, under the name timefast."""
    return {
        **origin(source),
        "frames": source.spec.frames,
        "crop": source.spec.crop,
        "short_side": source.spec.test_short_side,
        "mean": list(source.spec.mean),
        "std": list(source.spec.std),
        "classes": class_names(source.model, labels),
        **surroundings(),
    }


def write_program(model: torch.nn.Module, video: Tensor, dest: Path, about: str) -> None:
    """A torch.export program."""
    clips = torch.export.Dim("clips")
    with torch.no_grad():
        program = torch.export.export(model, (video,), dynamic_shapes=({0: clips},))
    torch.export.save(program, dest, extra_files={"timefast": about})


def write_onnx(model: torch.nn.Module, video: Tensor, dest: Path, about: str) -> None:
    """An ONNX model in one file, which that format limits to 2 GB."""
    if getattr(model, "config", {}).get("approx") is not None:
        raise InputError(
            "approximate attention draws its first landmark from a seeded generator, which ONNX "
            "has no word for; export to .pt2"
        )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    clips = torch.export.Dim("clips")
    with torch.no_grad():
        program = torch.onnx.export(
            model, (video,), dynamo=True, dynamic_shapes=({0: clips},), verbose=False,
            input_names=["video"], output_names=["logits"],
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["timefast"] = about
    program.save(str(dest), external_data=False)


WRITERS: dict[str, Callable[..., None]] = {".pt2": write_program, ".onnx": write_onnx}


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"writing ONNX needs {' and '.join(missing)}, not installed here: "
            '`pip install -e ".[onnx]"`'
        )


def _difference(model: torch.nn.Module, dest: Path, shape: Sequence[int]) -> float | None:
    """Largest difference of logits on three random clips, against the largest logit; None if there
    is nothing here to run the file with."""
    video = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(video)
    if dest.suffix == ".pt2":
        found = torch.export.load(dest).module()(video)
    elif find_spec("onnxruntime") is None:
        return None
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(dest), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"video": video.numpy()})[0])
    return ((found - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    sys.exit(main())
