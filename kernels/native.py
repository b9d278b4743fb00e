"""Attention over short sequences on a CPU in C: compiled once for this processor, called by ctypes.

Library attention is tuned for few long sequences. The models here have thousands of 8 to 200
tokens, where copies into other layouts, and products too small for a library call, cost more than
the arithmetic. native.c reads strided views as they are and writes results where they belong.

A C compiler is looked for (CC, gcc, cc, clang), as Triton and torch.compile do for their own code;
what it makes stays in the user's cache folder. Without one, and for what native.c does not take,
the ops use what PyTorch has.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger("timefast")

SOURCE = Path(__file__).with_name("native.c")
# -ffp-contract: a multiplication and an addition become one instruction, in any C standard
FLAGS = ("-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
         "-fno-trapping-math", "-w")  # fmt: skip
# Floats of one sequence's keys; a thread's buffers are some seven times that.
MAX_KEYS = 1 << 18
_enabled = True


class _Along(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("n", "T", "H", "D", "apart", "projected", "threads")
    ]


def why_not() -> str | None:
    """Why native.c cannot run on this machine; None if it can. Compiles it if need be."""
    return _library()[1]


# torch.compile calls it instead of looking inside. torch.compiler.assume_constant_result sets the
# same mark, and imports torch._dynamo for it.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes(*tensors: Tensor, keys: int, width: int) -> bool:
    """Whether the C loops take these inputs; they are not differentiated twice, nor exported."""
    return (
        _enabled
        and not _recorded()
        and keys * max(width, 16) <= MAX_KEYS
        and all(
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.bfloat16)
            and type(x) in (Tensor, torch.nn.Parameter)
            for x in tensors
        )
        and why_not() is None
    )


def _recorded() -> bool:
    """Whether operations are written down for elsewhere: torch.export, make_fx."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Inside, the ops do without the C loops, as on a machine without a compiler."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    order: tuple[int, ...],
    fold: int = 0,
    cls: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Any]:
    """softmax(scale * q k^T) v over the last dimensions of x.permute(order), [n0, n1, n2, S, D].

    `cls`, if given, are class tokens [n0, n2, D] of q, k and v, the first row of all sequences of
    theirs. Outputs: like q, and the class tokens' outputs [n0, n1, n2, D] in float32, or None.
    Channels of keys and values, counted over n2: the first `fold` are those of the next sequence
    along n1, as many after them those of the one before, with zeros beyond the ends.
    """
    if not torch.compiler.is_compiling():
        return _Attention.apply(q, k, v, scale, order, fold, *cls)
    out, cls_out, _ = _attention_op(q, k, v, *(cls or (None,) * 3), scale, order, fold)
    return out, cls_out if cls else None


class _Attention(torch.autograd.Function):
    """`attention`, with less to do for each call than an operator has."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        order: tuple[int, ...],
        fold: int,
        *cls: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        out, cls_out, kept = _results(q, k, cls, order, any(ctx.needs_input_grad))
        run_attention((q, k, v, out), (*cls, cls_out), scale, order, fold=fold, kept=kept)
        ctx.save_for_backward(q, k, v, kept, *cls)
        ctx.scale, ctx.order, ctx.fold = scale, order, fold
        return out, cls_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_cls: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, kept, *cls = ctx.saved_tensors
        grads, of_cls = _gradients(
            grad, grad_cls, q, k, v, cls, kept, ctx.scale, ctx.order, ctx.fold
        )
        return *grads, None, None, None, *of_cls


def _results(
    q: Tensor, k: Tensor, cls: Sequence[Tensor], order: Sequence[int], again: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Room for the outputs, and for the probabilities if they are wanted `again` and fewer than q:
    else forming them again is no slower."""
    few = q.shape[order[3]] + bool(cls) <= q.shape[order[4]]
    kept = room_to_keep(q, k, order, bool(cls)) if few and again else None
    return q.new_empty(q.shape), _cls_like(q, order) if cls else None, kept


def _gradients(
    grad: Tensor,
    grad_cls: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls: Sequence[Tensor],
    kept: Tensor | None,
    scale: float,
    order: Sequence[int],
    fold: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Of q, k, v, and of their class tokens."""
    grads = [q.new_empty(q.shape) for _ in range(3)]
    of_cls = [_cls_like(q, order) for _ in cls]
    given, of_class = (q, k, v, grad, *grads), (*cls, grad_cls if cls else None, *of_cls)
    run_attention(given, of_class, scale, order, fold=fold, kept=kept)
    # a class token is in all sequences along n1: its gradient is the sum over them
    return grads, [x.sum(1).to(q.dtype) for x in of_cls]


@torch.library.custom_op("timefast::cpu_attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor | None,
    cls_k: Tensor | None,
    cls_v: Tensor | None,
    scale: float,
    order: Sequence[int],
    fold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` as torch.compile takes it, whole. An output that there is not is empty."""
    cls = _given(cls_q, cls_k, cls_v)
    out, cls_out, kept = _results(q, k, cls, order, True)
    if kept is not None:
        kept.zero_()  # an operator's outputs repeat, also in the lanes behind the last query
    run_attention((q, k, v, out), (*cls, cls_out), scale, order, fold=fold, kept=kept)
    return out, _or_empty(cls_out, q), _or_empty(kept, q)


@_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor | None,
    cls_k: Tensor | None,
    cls_v: Tensor | None,
    scale: float,
    order: Sequence[int],
    fold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    out, cls_out, kept = _results(q, k, _given(cls_q, cls_k, cls_v), order, True)
    return out, _or_empty(cls_out, q), _or_empty(kept, q)


@torch.library.custom_op("timefast::cpu_attention_backward", mutates_args=())
def _attention_backward_op(
    grad: Tensor,
    grad_cls: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor | None,
    cls_k: Tensor | None,
    cls_v: Tensor | None,
    kept: Tensor,
    scale: float,
    order: Sequence[int],
    fold: int,
) -> list[Tensor]:
    cls = _given(cls_q, cls_k, cls_v)
    probabilities = kept if kept.numel() else None
    grads, of_cls = _gradients(grad, grad_cls, q, k, v, cls, probabilities, scale, order, fold)
    return [*grads, *of_cls]


@_attention_backward_op.register_fake
def _(
    grad: Tensor,
    grad_cls: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor | None,
    cls_k: Tensor | None,
    cls_v: Tensor | None,
    kept: Tensor,
    scale: float,
    order: Sequence[int],
    fold: int,
) -> list[Tensor]:
    cls = _given(cls_q, cls_k, cls_v)
    return [q.new_empty(q.shape) for _ in range(3)] + [x.new_empty(x.shape) for x in cls]


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x for x in tensors if x is not None)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.order, ctx.fold = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, grad: Tensor, grad_cls: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward_op(
        grad, grad_cls, *ctx.saved_tensors, ctx.scale, ctx.order, ctx.fold
    )
    return *grads, *[None] * (9 - len(grads))


_attention_op.register_autograd(_backward, setup_context=_setup)


def _cls_like(q: Tensor, order: Sequence[int]) -> Tensor:
    return q.new_empty([q.shape[i] for i in (*order[:3], 4)], dtype=torch.float32)


def room_to_keep(q: Tensor, k: Tensor, order: Sequence[int], cls_rows: int = 0) -> Tensor:
    """Where `run_attention` keeps the probabilities between forward and backward."""
    n0, n1, n2, row, _ = order
    lanes = _library()[0].lanes()
    queries = -(-(q.shape[row] + cls_rows) // lanes) * lanes
    shape = k.shape[n0], k.shape[n1], k.shape[n2], (k.shape[row] + cls_rows) * queries
    return k.new_empty(shape, dtype=torch.float32)


def run_attention(
    tensors: Sequence[Tensor],
    cls: Sequence[Tensor | None],
    scale: float,
    order: Sequence[int],
    *,
    fold: int = 0,
    shared: bool = False,
    kept: Tensor | None = None,
) -> None:
    """Attention, or its backward pass, into tensors that are there.

    `tensors` are q, k, v and out, or q, k, v, d out, dq, dk and dv; x.permute(order) is
    [n0, n1, n2, rows, D]. `cls` are their class tokens, [n0, n1, n2, D], or [n0, n2, D] where they
    are the same along n1; without class tokens it may be shorter. `shared`: q has no n1 of its own,
    and dq is the sum along it. `kept`: from `room_to_keep`, the same in both directions.
    """
    k = tensors[1]
    if k.numel() == 0:
        return
    n0, n1, n2, row, last = order
    numbers = [k.shape[n0], k.shape[n1], k.shape[n2], tensors[0].shape[row], k.shape[row],
               k.shape[last], fold, shared, torch.get_num_threads(),
               0 if kept is None else kept.data_ptr()]  # fmt: skip
    alive = []
    for x, c in itertools.zip_longest(tensors, cls):
        strides = x.stride()
        if strides[last] != 1 or x.is_neg():
            x = x.resolve_neg().contiguous()  # an input: what is written is dense
            strides = x.stride()
            alive.append(x)
        size = x.element_size()
        numbers += (x.data_ptr(), strides[n0] * size, strides[n1] * size, strides[n2] * size,
                    strides[row] * size)  # fmt: skip
        if c is None:
            numbers += (0, 0, 0, 0)
            half_cls = False
        else:
            strides = c.stride()
            if strides[-1] != 1 or c.is_neg():
                c = c.resolve_neg().contiguous()
                strides = c.stride()
                alive.append(c)
            size = c.element_size()
            middle = strides[1] * size if c.dim() == 4 else 0
            numbers += (c.data_ptr(), strides[0] * size, middle, strides[-2] * size)
            half_cls = size == 2
        numbers += (x.element_size() == 2, half_cls)
    library = _library()[0]
    run = library.attend if len(tensors) == 4 else library.attend_backward
    _check(run(struct.pack(f"{len(numbers)}q", *numbers), ctypes.c_float(scale)))


def run_along(
    x: Tensor, absorbed: Tensor, scale: float, projected: bool, heads: int
) -> tuple[Tensor, Tensor]:
    """Second step of trajectory attention, from x [M, T, C] and absorbed queries [H, M, C], both
    contiguous float32: probabilities [M, H, T], and the sums over T that they weight: of each
    head's part of x [M, H, D], or, if projected, of the whole of x [H, M, C]."""
    p = x.new_empty(len(x), heads, x.shape[1])
    out = (
        torch.empty_like(absorbed) if projected else x.new_empty(len(x), heads, x.shape[2] // heads)
    )
    shape = _along(x, heads, projected)
    _check(
        _library()[0].along(shape, _at(x), _at(absorbed), ctypes.c_float(scale), _at(p), _at(out))
    )
    return p, out


def run_along_backward(
    x: Tensor, absorbed: Tensor, scale: float, projected: bool, p: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the absorbed queries."""
    dx, d_absorbed = torch.empty_like(x), torch.empty_like(absorbed)
    shape = _along(x, p.shape[1], projected)
    tensors = [_at(t) for t in (p, grad, dx, d_absorbed)]
    _check(
        _library()[0].along_backward(shape, _at(x), _at(absorbed), ctypes.c_float(scale), *tensors)
    )
    return dx, d_absorbed


def lanes() -> int:
    """Numbers in one vector register; heads of trajectory attention are a multiple of it wide."""
    return _library()[0].lanes()


def _along(x: Tensor, heads: int, projected: bool) -> Any:
    tokens, frames, width = x.shape
    shape = _Along(
        tokens, frames, heads, width // heads, tokens * width, projected, torch.get_num_threads()
    )
    return ctypes.byref(shape)


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("attention on the CPU: no memory for a thread's buffers")


@functools.cache
def _library() -> tuple[Any, str | None]:
    """native.c compiled and loaded, or why that failed."""
    try:
        file, reason = _compiled(), None
        try:
            library = ctypes.CDLL(str(file))
        except OSError:  # perhaps a file in the cache is not what the compiler wrote: once more
            file.unlink(missing_ok=True)
            library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        library, reason = None, str(error)
        logger.warning("attention on the CPU uses the slower functions of PyTorch: %s", reason)
    return library, reason


def _compiled() -> Path:
    """The shared library, made unless it is in the cache."""
    compiler = _compiler()
    processor = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*compiler, *FLAGS, processor, str(SOURCE), "-o"]
    made_of = [SOURCE.read_text(encoding="utf-8"), *command, _processor()]
    name = f"native-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if (folder / name).exists():
        return folder / name
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as unfinished:
        pass
    try:
        run = subprocess.run(
            [*command, unfinished.name], capture_output=True, text=True, timeout=300
        )
        if run.returncode:
            said = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            # a linker's error stands before the one that says that there was one
            error = next((x for x in said if "error" in x or "cannot find" in x), said[-1])
            raise RuntimeError(f"{' '.join(compiler)} could not compile {SOURCE.name}: {error}")
        os.replace(unfinished.name, folder / name)
    finally:
        Path(unfinished.name).unlink(missing_ok=True)
    logger.info("compiled the CPU's attention loops: %s", folder / name)
    return folder / name


def _compiler() -> list[str]:
    if given := shlex.split(os.environ.get("CC", "")):
        return given
    for name in ("gcc", "cc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise RuntimeError("no C compiler: none of gcc, cc, clang is installed, and CC is not set")


def _processor() -> str:
    """What -march=native looks at: a home folder may be shared by several kinds of machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    kinds = ("model name", "flags", "CPU part", "Features")
    return "".join(sorted({x for x in lines if x.startswith(kinds)})) or platform.processor()


def _cache_folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timefast"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        pass
    temporary = tempfile.mkdtemp(prefix="timefast-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)
