"""The one registration point of the ops: a record per op, and the dispatcher that picks an
implementation.

An op file ends with `register(Op(...))`; its public function checks shapes and calls `dispatch`.
Reasons are sentences with values, all of them collected before anything is raised. A named
implementation runs or raises, it never falls back; `auto` takes the first implementation that has
no objection and says once which one that was.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger("timefast")


def _no_reasons(*args: Any, **kwargs: Any) -> list[str]:
    return []


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
    chosen: dict[str, str] = field(default_factory=dict)  # device type -> what "auto" last chose

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
    run. `TIMEFAST_IMPL` replaces "auto" for a whole process (read at each call, never at import).
    """
    if impl == "auto":
        impl = os.environ.get("TIMEFAST_IMPL", "auto")
    impls = op.all_impls()
    if impl != "auto":
        if impl not in impls:
            raise ValueError(f"{op.name}: impl={impl!r}; expected auto, {', '.join(impls)}")
        reasons = _reasons(impls[impl], args, kwargs)
        if reasons:
            raise NotImplementedError(_refusal(op, {impl: reasons}, args, kwargs))
        return impls[impl].run(*args, **kwargs)

    device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
    refused: dict[str, list[str]] = {}
    for name, candidate in impls.items():
        if device in candidate.auto:
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
        logger.debug("%s: impl %s on %s", op.name, name, device)
