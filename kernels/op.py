"""The one registration point of the ops: a record per op, and the dispatcher that picks an
implementation.

An op file ends with `register(Op(...))`; its public function checks shapes and calls `dispatch`.
Reasons are sentences with values, all of them collected before anything is raised. A named
implementation runs or raises, it never falls back; `auto` takes the first implementation that has
no objection and says once which one that was.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger("timefast")
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # looks for a file, imports nothing


def _no_reasons(*args: Any, **kwargs: Any) -> list[str]:
    return []


def in_float32(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Let a plain formula run in float32 on half-precision inputs, and round its outputs once.

    float32 and float64 pass through. `__wrapped__` is the formula in the precision of its inputs:
    tests take its rounding error in half precision as the measure for the implementations.
    """

    @functools.wraps(formula)
    def reference(*args: Any, **kwargs: Any) -> Any:
        dtype = args[0].dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return formula(*args, **kwargs)
        out = formula(*(_float(a) for a in args), **{k: _float(v) for k, v in kwargs.items()})
        return tuple(o.to(dtype) for o in out) if isinstance(out, tuple) else out.to(dtype)

    return reference


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value


def library_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """PyTorch's attention over the last two dimensions; half precision on a CPU in float32, since
    there it rounds probabilities too."""
    dtype = q.dtype
    if q.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, scale=scale).to(dtype)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast where it is on for a device type."""
    known = torch.amp.is_autocast_available(device)  # "meta" is not, and may not be asked
    if not known or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on for their device (float64 stays)."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def check_like(
    first: str,
    model: torch.Tensor,
    name: str,
    x: torch.Tensor,
    shape: Sequence[int],
    *,
    any_float: bool = False,
) -> None:
    """Raise ValueError unless `x` has this shape, and the dtype and device of `model`."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor {list(shape)}, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected {list(shape)} to go with {first} {list(model.shape)}, "
            f"got {list(x.shape)}"
        )
    if x.device != model.device or (x.dtype != model.dtype and not any_float):
        raise ValueError(
            f"{name}: expected {model.dtype} on {model.device} like {first}, "
            f"got {x.dtype} on {x.device}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")


def triton_unavailable() -> list[str]:
    """Why no Triton kernel can run on this machine."""
    if not _HAS_TRITON:
        return ["Triton is not installed; `pip install triton` provides it"]
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return ["torch sees no CUDA device (TRITON_INTERPRET=1 runs kernels on the CPU, for tests)"]
    return []


def why_not_triton(q: torch.Tensor, max_width: int, name: str = "q") -> list[str]:
    """Why Triton kernels cannot take inputs like `q`, an argument of this name."""
    reasons = []
    if q.device.type == "cuda":
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            reasons.append(f"{q.device} is older than compute capability 8.0")
    elif q.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"{name} is on {q.device}; triton takes CUDA")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"{name} is {q.dtype}; triton takes float16, bfloat16, float32")
    if q.shape[-1] > max_width:
        reasons.append(
            f"{name} is {q.shape[-1]} wide in its last dimension; triton takes {max_width}"
        )
    return reasons


@dataclass(frozen=True)
class Impl:
    """One implementation of an op."""

    run: Callable[..., Any]
    why_not: Callable[..., list[str]] = _no_reasons  # about these inputs (same arguments as run)
    unavailable: Callable[[], list[str]] = _no_reasons  # about this machine
    auto: tuple[str, ...] = ("cpu", "cuda")  # device types on which "auto" may choose it


@dataclass(frozen=True)
class Case:
    """Inputs that tests and benches share: build(dtype, device, generator) -> (args, kwargs)."""

    name: str
    build: Callable[[torch.dtype, str, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    size: str = "tiny"  # "tiny": swept by the tests; "mid": CPU benches; "paper": GPU benches


@dataclass(frozen=True)
class Op:
    """The record of an op. `impls` are tried by "auto" in the order given, reference last."""

    name: str
    reference: Callable[..., Any]
    impls: dict[str, Impl]
    cases: tuple[Case, ...] = ()
    chosen: dict[str, str] = field(default_factory=dict)  # device type -> what it last ran with

    def all_impls(self) -> dict[str, Impl]:
        return {**self.impls, "reference": Impl(self.reference)}


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    OPS[op.name] = op
    return op


def implementations(name: str) -> dict[str, list[str]]:
    """The implementations of an op, each with the reasons why it cannot run here (none: it can)."""
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}; there are {', '.join(sorted(OPS))}")
    return {key: impl.unavailable() for key, impl in OPS[name].all_impls().items()}


def first_choice(name: str, device: str) -> str:
    """What "auto" takes on a device type, unless the inputs speak against it."""
    impls = OPS[name].all_impls().items()
    return next(key for key, i in impls if device in i.auto and not i.unavailable())


def describe(*args: Any, **kwargs: Any) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            return f"{dtype}{list(value.shape)} on {value.device}"
        return repr(value)

    return ", ".join([one(a) for a in args] + [f"{k}={one(v)}" for k, v in kwargs.items()])


def dispatch(op: Op, impl: str, *args: Any, **kwargs: Any) -> Any:
    """Run `op` with the implementation named, or for "auto" the first that can.

    Raises ValueError for an unknown name, NotImplementedError with all reasons for one that cannot
    run. `TIMEFAST_IMPL` replaces "auto" for a whole process (read at each call, never at import;
    torch.compile reads it when it traces). Autocast is off inside: an op rounds where it says so.
    """
    device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
    if autocast_dtype(device) is not None:
        with torch.autocast(device, enabled=False):
            return dispatch(op, impl, *args, **kwargs)
    if impl == "auto":
        impl = os.environ.get("TIMEFAST_IMPL", "auto")
    impls = op.all_impls()
    if impl != "auto":
        if impl not in impls:
            raise ValueError(f"{op.name}: impl={impl!r}; expected auto, {', '.join(impls)}")
        reasons = _reasons(impls[impl], args, kwargs)
        if reasons:
            raise NotImplementedError(_refusal(op, {impl: reasons}, args, kwargs))
        if not torch.compiler.is_compiling():
            op.chosen[device] = impl
        return impls[impl].run(*args, **kwargs)

    refused: dict[str, list[str]] = {}
    for name, candidate in impls.items():
        if device in candidate.auto or name == "reference":
            refused[name] = _reasons(candidate, args, kwargs)
            if not refused[name]:
                if not torch.compiler.is_compiling() and op.chosen.get(device) != name:
                    _say(op, device, name, refused)
                return candidate.run(*args, **kwargs)
    raise NotImplementedError(_refusal(op, refused, args, kwargs))


def _reasons(impl: Impl, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    return impl.unavailable() or impl.why_not(*args, **kwargs)


def _refusal(op: Op, refused: dict[str, list[str]], args: Any, kwargs: Any) -> str:
    lines = [f"{op.name} cannot run on ({describe(*args, **kwargs)}):"]
    lines += [f"  {name}: {reason}" for name, reasons in refused.items() for reason in reasons]
    return "\n".join(lines)


def _say(op: Op, device: str, name: str, refused: dict[str, list[str]]) -> None:
    op.chosen[device] = name
    if name == "reference" and device == "cuda":
        because = "; ".join(f"{k}: {r}" for k, rs in refused.items() for r in rs)
        logger.warning("%s runs the slow reference on a CUDA tensor (%s)", op.name, because)
    else:
        logger.info("%s: implementation %s on %s", op.name, name, device)
