"""The configuration of a run: frozen dataclasses, and command-line flags generated from them.

Every field is one flag, `--batch-size` for `OptimConfig.batch_size` (also `--optim.batch-size`);
type, choices and help come from the field. No function below the commands receives the whole
configuration.
"""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from timefast.errors import InputError

Backbone = Literal["timesformer", "motionformer", "xvit"]
Loss = Literal["order", "debias", "flow"]
ALL_LOSSES: tuple[Loss, ...] = ("order", "debias", "flow")


def _at_least(config: Any, least: int, *names: str) -> None:
    """Refuse fields below `least`; one that is None is off."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            _reject(config, name, f"at least {least}")


def _share(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            _reject(config, name, "from 0 up to, not including, 1")


def _reject(config: Any, name: str, expected: str) -> NoReturn:
    flag = "--" + name.replace("_", "-")
    raise InputError(f"{flag}: expected {expected}, got {getattr(config, name)}")


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class ModelConfig:
    backbone: Backbone = _flag("timesformer", "backbone")
    frames: int = _flag(8, "frames per clip")
    image_size: int = _flag(224, "side of the square crop, pixels")
    patch_size: int = _flag(16, "side of a patch, pixels")
    dim: int = _flag(768, "model width")
    depth: int = _flag(12, "blocks")
    heads: int = _flag(12, "attention heads")
    mlp_ratio: float = _flag(4.0, "hidden width of the MLP over model width")
    drop_path: float = _flag(0.1, "stochastic depth rate of the last block")
    init: Literal["auto", "published", "scratch"] = _flag(
        "auto",
        "initialisation: published (made for ImageNet weights), scratch, or auto: scratch with "
        "weights=none, else published",
    )
    time_embed_every_block: bool = _flag(
        False, "add the time embedding again before every block (appendix D of the paper)"
    )
    weights: str = _flag(
        "imagenet", "initial weights: imagenet, none, a timm hub id, or a checkpoint file"
    )

    def __post_init__(self) -> None:
        _at_least(self, 1, "frames", "image_size", "patch_size", "dim", "depth", "heads")
        if self.image_size % self.patch_size:
            _reject(self, "image_size", f"a multiple of patch_size={self.patch_size}")
        if self.dim % self.heads:
            _reject(self, "dim", f"a multiple of heads={self.heads}")
        if self.mlp_ratio <= 0:
            _reject(self, "mlp_ratio", "a positive number")
        _share(self, "drop_path")


@dataclass(frozen=True)
class DataConfig:
    root: Path | None = _flag(
        None, "data set folder; without it the demo set is made and used", flag="--data"
    )
    subset: str | None = _flag(
        None, "train on these classes alone: temporal, static, or a file with a class name a line"
    )
    short_side: tuple[int, int] = _flag((256, 320), "training jitter of the short side, pixels")
    test_short_side: int = _flag(224, "short side in evaluation, pixels")
    rand_augment: str | None = _flag("rand-m20-mstd0.5-inc1", "RandAugment, or none")
    pipeline: Literal["auto", "dali", "cpu"] = _flag("auto", "who decodes")
    workers: int | None = _flag(None, "decoding processes (default: from the number of cores)")
    max_bad_fraction: float = _flag(
        0.01, "stop when more of the videos than this, and more than 10, are unusable"
    )
    max_bad_in_a_row: int = _flag(50, "stop when this many videos in a row are unusable")

    def __post_init__(self) -> None:
        _at_least(self, 0, "workers")
        _at_least(self, 1, "max_bad_in_a_row")
        if not 0 <= self.max_bad_fraction <= 1:
            _reject(self, "max_bad_fraction", "from 0 to 1")


@dataclass(frozen=True)
class MethodConfig:
    losses: tuple[Loss, ...] = _flag(
        ALL_LOSSES, "TIME losses beside classification: a list of order,debias,flow, or none"
    )
    weight_order: float = _flag(1.0, "weight of the order loss (the paper: 1)")
    weight_debias: float = _flag(1.0, "weight of the debias loss (the paper: 1)")
    weight_flow: float = _flag(1.0, "weight of the flow loss (the paper: 1)")
    # the published code smooths all three by 0.2, the paper writes plain cross entropy
    smoothing_class: float = _flag(0.2, "label smoothing of the classification loss")
    smoothing_order: float = _flag(0.2, "label smoothing of the order loss")
    smoothing_flow: float = _flag(0.2, "label smoothing of the flow loss")
    flow_rule: Literal["minmax", "tau"] = _flag(
        "minmax", "when a patch counts as moving: minmax (published code) or tau (paper)"
    )
    flow_tau: float | None = _flag(None, "threshold of rule tau, pixels")

    def __post_init__(self) -> None:
        if (self.flow_rule == "tau") != (self.flow_tau is not None):
            _reject(self, "flow_tau", "a number with flow_rule=tau, none with minmax")
        if len(set(self.losses)) < len(self.losses):
            _reject(self, "losses", "each loss at most once")
        _at_least(self, 0, "flow_tau", "weight_order", "weight_debias", "weight_flow")
        _share(self, "smoothing_class", "smoothing_order", "smoothing_flow")

    def weights(self) -> tuple[float, float, float]:
        """Weights of (order, debias, flow); 0 for a loss that is not asked for."""
        all_weights = {
            "order": self.weight_order,
            "debias": self.weight_debias,
            "flow": self.weight_flow,
        }
        order, debias, flow = (w if k in self.losses else 0.0 for k, w in all_weights.items())
        return order, debias, flow


@dataclass(frozen=True)
class OptimConfig:
    epochs: int = _flag(35, "passes over the training videos")
    max_steps: int | None = _flag(None, "stop after this many optimizer steps")
    batch_size: int = _flag(
        64, "clips per optimizer step and accumulation part, of all processes together"
    )
    accumulate: int = _flag(1, "batches whose gradients are summed before a step")
    lr: float = _flag(1e-4, "peak learning rate of AdamW")
    weight_decay: float = _flag(0.05, "weight decay of tensors with more than one dimension")
    decay_embeddings: bool = _flag(
        True, "decay class token, position and time embeddings too, as the published code does"
    )
    amsgrad: bool = _flag(True, "AMSGrad, as the published code uses")
    beta1: float = _flag(0.9, "AdamW beta1")
    beta2: float = _flag(0.999, "AdamW beta2")
    eps: float = _flag(1e-8, "AdamW epsilon")
    schedule: Literal["step", "cosine"] = _flag("step", "learning rate schedule")
    lr_steps: tuple[int, ...] = _flag((20, 30), "epochs after which schedule=step divides by 10")
    warmup_epochs: float = _flag(0.0, "epochs of linear warm-up")
    clip_grad: float | None = _flag(None, "clip the gradient norm to this")

    def __post_init__(self) -> None:
        _at_least(self, 1, "epochs", "batch_size", "accumulate")
        _at_least(self, 1, "max_steps")
        _at_least(self, 0, "weight_decay", "warmup_epochs")
        _share(self, "beta1", "beta2")
        for name in ("lr", "eps", "clip_grad"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                _reject(self, name, "a positive number")


@dataclass(frozen=True)
class RunConfig:
    out: Path | None = _flag(None, "run folder (default: runs/<recipe>-<time>)")
    seed: int = _flag(0, "seed of every random choice")
    device: str = _flag("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _flag(
        "auto", "auto: bf16 on a GPU, fp32 on a CPU"
    )
    impl: str = _flag("auto", "implementation of the ops: auto, triton, cpu or reference")
    compile: bool = _flag(False, "torch.compile the backbone")
    cuda_graphs: bool = _flag(
        False, "capture forward and backward of a full batch as CUDA graphs and replay them"
    )
    checkpoint_activations: Literal["none", "gelu", "mlp", "blocks"] = _flag(
        "none", "what the backward pass computes again instead of keeping it in memory"
    )
    profile: bool = _flag(False, "write a profiler trace and the time of each part of a step")
    shard: bool = _flag(
        False, "spread weights and optimizer state over the processes (FSDP2), for larger models"
    )
    timeout: float = _flag(600.0, "seconds after which a process that hears of no other gives up")
    eval_every: int = _flag(1, "epochs between evaluations")
    views: tuple[int, int] = _flag((1, 3), "temporal x spatial views of the final evaluation")
    shuffles: int = _flag(3, "random frame orders per video in the final evaluation")
    log_every: int = _flag(10, "steps between lines of metrics.jsonl")
    save_every: int = _flag(500, "steps between checkpoints (also saved at the end of an epoch)")
    keep: int = _flag(2, "checkpoints to keep")

    def __post_init__(self) -> None:
        _at_least(self, 1, "eval_every", "shuffles", "log_every", "save_every", "keep")
        _at_least(self, 0, "seed")
        if self.timeout <= 0:
            _reject(self, "timeout", "a positive number of seconds")
        if self.shard and self.compile:
            raise InputError("--shard and --compile: leave one of the two out")
        for name in ("shard", "compile", "profile", "checkpoint_activations"):
            if self.cuda_graphs and getattr(self, name) not in (False, "none"):
                other = name.replace("_", "-")
                raise InputError(f"--cuda-graphs and --{other}: leave one of the two out")
        if self.views[0] < 1 or self.views[1] not in (1, 3):
            _reject(self, "views", "1 or more temporal x 1 or 3 spatial")


@dataclass(frozen=True)
class TrainConfig:
    """A complete run. Recipes return one; flags replace fields of it."""

    recipe: str = "custom"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        if "flow" in self.method.losses and self.model.frames < 2:
            _reject(self.model, "frames", "at least 2 with the flow loss")
        crop, (low, high) = self.model.image_size, self.data.short_side
        if not crop <= low <= high:
            _reject(self.data, "short_side", f"low,high with image_size={crop} <= low <= high")
        if self.data.test_short_side < crop:
            _reject(self.data, "test_short_side", f"at least image_size={crop}")
        if self.data.rand_augment is not None:
            from timefast.data.augment import parse_rand_augment  # late: it imports torch

            try:
                parse_rand_augment(self.data.rand_augment)
            except InputError as error:
                raise InputError(f"--rand-augment: {error}; none switches it off") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as config.json stores them."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, (tuple, list)):
                return [plain(v) for v in value]
            return str(value) if isinstance(value, Path) else value

        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        parts: dict[str, Any] = {"recipe": values["recipe"]}
        for section in sections():
            kind = type(getattr(cls(), section))
            hints = typing.get_type_hints(kind)
            given = values[section]
            unknown = sorted(set(given) - set(hints))
            if unknown:
                raise InputError(f"config: section {section} has unknown fields {unknown}")
            parts[section] = kind(**{k: _from_plain(hints[k], v) for k, v in given.items()})
        return cls(**parts)

    def replace(self, changes: dict[tuple[str, str], Any]) -> "TrainConfig":
        """A copy with the fields {(section, name): value} replaced."""
        new: dict[str, Any] = {}
        for section in sections():
            part = {name: v for (s, name), v in changes.items() if s == section}
            new[section] = dataclasses.replace(getattr(self, section), **part)
        return dataclasses.replace(self, **new)


def sections() -> tuple[str, ...]:
    return tuple(f.name for f in fields(TrainConfig) if f.name != "recipe")


def flag_of(section: str, name: str) -> str:
    """The command-line flag of a field."""
    kind = type(getattr(TrainConfig(), section))
    spec = next(f for f in fields(kind) if f.name == name)
    return spec.metadata.get("flag", "--" + name.replace("_", "-"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of every section; flags that are not given leave no trace."""
    for section in sections():
        kind = type(getattr(TrainConfig(), section))
        hints = typing.get_type_hints(kind)
        group = parser.add_argument_group(section)
        for spec in fields(kind):
            names = [flag_of(section, spec.name)]
            names.append(f"--{section}.{spec.name.replace('_', '-')}")
            options: dict[str, Any] = {
                "dest": f"{section}.{spec.name}",
                "default": argparse.SUPPRESS,
                "help": spec.metadata["help"],
            }
            group.add_argument(*names, **options, **_argument(hints[spec.name], spec.name))


def given_flags(namespace: argparse.Namespace) -> dict[tuple[str, str], Any]:
    """{(section, name): value} of the flags on the command line."""
    changes: dict[tuple[str, str], Any] = {}
    for key, value in vars(namespace).items():
        section, dot, name = key.partition(".")
        if dot:
            changes[section, name] = value
    return changes


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations and names the nearest flag to an unknown one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, extra = self.parse_known_args(args, namespace)
        if extra:
            near = difflib.get_close_matches(extra[0].split("=")[0], self._option_string_actions, 1)
            hint = f"; did you mean {near[0]}?" if near else "; see --help"
            self.error(f"unknown argument {extra[0]}{hint}")
        return known


def _argument(hint: Any, name: str) -> dict[str, Any]:
    """Options of argparse for a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    metavar = name.upper()
    if typing.get_origin(hint) is tuple:
        metavar = "A,B"
    return {"type": lambda text: _parse(hint, text, name), "metavar": metavar}


def _parse(hint: Any, text: str, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    try:
        if not text:
            raise ValueError("it is empty")
        if origin in (typing.Union, types.UnionType):  # Optional[...]
            inner = next(a for a in args if a is not type(None))
            return None if text == "none" else _parse(inner, text, name)
        if origin is tuple:
            if text == "none":
                return ()
            parts = text.replace("x", ",").split(",") if args[0] is int else text.split(",")
            values = tuple(_parse(args[0], part, name) for part in parts)
            if args[-1] is not Ellipsis and len(values) != len(args):
                raise ValueError(f"expected {len(args)} values, got {len(values)}")
            return values
        if origin is Literal:
            if text not in args:
                raise ValueError(f"expected one of {', '.join(args)}, got {text!r}")
            return text
        if hint is float and not math.isfinite(float(text)):
            raise ValueError("expected a finite number")
        return hint(text).expanduser() if hint is Path else hint(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _from_plain(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    if hint is Path or Path in typing.get_args(hint):
        return Path(value)
    return value
