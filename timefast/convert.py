"""Foreign checkpoints and ours: `python -m timefast.convert SOURCE DEST [--to FAMILY]`.

Weights go there and back bit by bit, those that their own model never reads included.

Which family a state dict is of, what sizes it tells, and one pure state-dict-to-state-dict function
per family and direction. Our own keys are those of the published TIME code, so that family needs
no function.
"""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timefast.config import Parser
from timefast.errors import InputError
from timefast.log import to_console
from timefast.models.vit import grid_of, resize_frames, resize_grid

logger = logging.getLogger("timefast")
State = dict[str, Tensor]
NEVER_READ = "the model it comes from never reads it"
KEPT = "unused."  # before the key of such a weight in a file of this project, for the way back

# family -> backbone it holds ("imagenet" starts any of them), normalisation its clips had
FAMILIES: dict[str, tuple[str | None, tuple[float, float]]] = {
    "time_timesformer": ("timesformer", (0.5, 0.5)),
    "time_motionformer": ("motionformer", (0.5, 0.5)),
    "time_xvit": ("xvit", (0.5, 0.5)),
    "timesformer": ("timesformer", (0.45, 0.225)),
    "huggingface": ("timesformer", (0.45, 0.225)),
    "imagenet": (None, (0.5, 0.5)),
}


@dataclass
class Converted:
    """A state dict in our keys, and what became of the rest."""

    state: State
    how: dict[str, str] = field(default_factory=dict)  # our key -> what was done to its value
    unused: dict[str, str] = field(default_factory=dict)  # foreign key -> why nothing reads it


def recognise(state: Mapping[str, Tensor]) -> str:
    """The family of a state dict, from its keys alone.

    The published Motionformer and X-ViT differ from TIME's in a few keys only, which
    `from_motionformer` and `from_xvit` take care of. Raises InputError if no family fits.
    """
    if any(key.startswith(("timesformer.", "encoder.layer.")) for key in state):
        return "huggingface"
    if any(key.startswith("model.blocks.") for key in state):
        return "timesformer"
    if any(key.startswith("base_model.") for key in state):
        return "time_xvit"
    if not {"cls_token", "pos_embed"} <= set(state):
        raise InputError(
            f"no known family has these keys: {_some(state)}. Known are checkpoints of this "
            "project, TIME, TimeSformer, Motionformer, X-ViT, Hugging Face TimeSformer and "
            "ImageNet ViTs with timm's keys."
        )
    if "temp_embed" in state or "st_embed" in state:
        return "time_motionformer"
    if "time_embed" in state or "temp_head.weight" in state:
        return "time_timesformer"
    return "imagenet"


def to_native(state: Mapping[str, Tensor], family: str) -> Converted:
    """A state dict of any family but "imagenet" in our keys."""
    if family == "huggingface":
        return from_huggingface(state)
    if family == "timesformer":
        return from_timesformer(state)
    if family == "time_motionformer":
        return from_motionformer(state)
    if family == "time_xvit":
        return from_xvit(state)
    return Converted(dict(state))


def from_timesformer(state: Mapping[str, Tensor]) -> Converted:
    """The published TimeSformer: our keys behind the prefix `model.`."""
    return Converted({key.removeprefix("model."): value for key, value in state.items()})


def to_timesformer(state: Mapping[str, Tensor]) -> State:
    """Inverse of `from_timesformer`; the TIME heads, which that project has not, are left out."""
    return {f"model.{key}": value for key, value in _without_time_heads(state).items()}


def _without_time_heads(state: Mapping[str, Tensor]) -> State:
    return {key: value for key, value in state.items() if not _TIME_HEAD.match(key)}


_TIME_HEAD = re.compile(r"(temp_head|mlp_[qkv]|mlp_proj|mlp_norm|flow_head)\.")

# Hugging Face <-> ours, within one layer and outside of the layers
_HF_LAYER = {
    "attention.attention.qkv": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "temporal_attention.attention.qkv": "temporal_attn.qkv",
    "temporal_attention.output.dense": "temporal_attn.proj",
    "temporal_dense": "temporal_fc",
    "temporal_layernorm": "temporal_norm1",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_OTHER = {
    "timesformer.embeddings.cls_token": "cls_token",
    "timesformer.embeddings.position_embeddings": "pos_embed",
    "timesformer.embeddings.time_embeddings": "time_embed",
    "timesformer.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "timesformer.layernorm": "norm",
    "classifier": "head",
}


def _rename(key: str, layer: str, new_layer: str, within: dict, others: dict) -> str:
    """`layer` is the text before a layer's number, for example `blocks.`."""
    if key.startswith(layer):
        number, rest = key.removeprefix(layer).split(".", 1)
        part, _, kind = rest.rpartition(".")
        return f"{new_layer}{number}.{within.get(part, part)}.{kind}"
    if key in others:
        return others[key]
    part, _, kind = key.rpartition(".")
    return f"{others[part]}.{kind}" if part in others else key


def from_huggingface(state: Mapping[str, Tensor]) -> Converted:
    """`TimesformerForVideoClassification`, or `TimesformerModel`, which has no classifier and no
    prefix."""
    prefix = "" if any(key.startswith("timesformer.") for key in state) else "timesformer."
    layer = "timesformer.encoder.layer."
    new = {key: _rename(prefix + key, layer, "blocks.", _HF_LAYER, _HF_OTHER) for key in state}
    return Converted(
        {new[key]: value for key, value in state.items()},
        how={name: f"renamed from {key}" for key, name in new.items() if name != key},
    )


def to_huggingface(state: Mapping[str, Tensor]) -> State:
    """Inverse of `from_huggingface`; the TIME heads, which that model has not, are left out."""
    layer = {ours: theirs for theirs, ours in _HF_LAYER.items()}
    other = {ours: theirs for theirs, ours in _HF_OTHER.items()}
    return {
        _rename(key, "blocks.", "timesformer.encoder.layer.", layer, other): value
        for key, value in _without_time_heads(state).items()
    }


def from_motionformer(state: Mapping[str, Tensor]) -> Converted:
    """The published Motionformer keeps two patch embeddings and reads one of them; its models for
    EPIC-Kitchens have two classifiers in the place of one."""
    out = Converted(dict(state))
    for key in state:
        if key.startswith(("head0.", "head1.")):
            out.unused[key] = "a classifier of verbs or nouns; a model here has one classifier"
            del out.state[key]
    tubes = state.get("patch_embed_3d.proj.weight")
    if tubes is not None:
        dead = "patch_embed." if tubes.shape[2] > 1 else "patch_embed_3d."
        for key in state:
            if key.startswith(dead):
                out.unused[key] = NEVER_READ
                del out.state[key]
    return out


def from_xvit(state: Mapping[str, Tensor]) -> Converted:
    """The published X-ViT calls its last linear layer `consensus.mlp_head.4`, TIME
    `consensus.head`; its `new_fc` is never read."""
    out = Converted({})
    for key, value in state.items():
        if key.startswith("new_fc."):
            out.unused[key] = NEVER_READ
            continue
        name = key.replace("consensus.mlp_head.4.", "consensus.head.")
        out.state[name] = value
        if name != key:
            out.how[name] = f"renamed from {key}"
    return out


def to_xvit(state: Mapping[str, Tensor]) -> State:
    """Inverse of `from_xvit`; the TIME heads, which that project has not, are left out."""
    return {
        key.replace("consensus.head.", "consensus.mlp_head.4."): value
        for key, value in _without_time_heads(state).items()
    }


def from_imagenet(
    state: Mapping[str, Tensor],
    backbone: str,
    shapes: Mapping[str, Sequence[int]],
    grid: tuple[int, int],
) -> Converted:
    """An ImageNet ViT with timm's keys, inflated for a video model.

    `shapes` are those of the model's state dict and `grid` the patch grid of its position table;
    what the image model does not tell (time embeddings, temporal_fc, heads of TIME, a classifier of
    another number of classes) is not in the result and keeps its initialisation.
    """
    out = Converted({})
    prefix = "base_model." if backbone == "xvit" else ""
    for key, value in square_patches(state).items():
        name = prefix + key
        fits = name in shapes and tuple(shapes[name]) == tuple(value.shape)
        if key.startswith(("head.", "pre_logits.")) and not fits:
            out.unused[key] = "the classifier of another set of classes"
            continue
        if key == "pos_embed" and name in shapes and shapes[name][1] != value.shape[1]:
            # TIME resizes bicubic for TimeSformer, X-ViT bilinear
            mode = "bilinear" if backbone == "xvit" else "bicubic"
            value = _resize_positions(value, grid, mode)
            out.how[name] = f"resized to {grid[0]}x{grid[1]} patches ({mode})"
        out.state[name] = value
        if prefix:
            out.how.setdefault(name, f"renamed from {key}")
    if backbone == "timesformer":
        _copy_to_time(out, shapes)
    if backbone == "motionformer":
        _inflate_tubes(out, shapes)
    return out


def square_patches(state: Mapping[str, Tensor]) -> State:
    """An ImageNet state dict with its patch weight [C, 3*p*p] as [C, 3, p, p]."""
    key = "patch_embed.proj.weight"
    weight = state.get(key)
    if weight is None or weight.ndim != 2:
        return dict(state)
    side = math.isqrt(weight.shape[1] // 3)
    return {**state, key: weight.reshape(-1, 3, side, side)}


def _copy_to_time(out: Converted, shapes: Mapping[str, Sequence[int]]) -> None:
    for key in list(out.state):
        name = key.replace(".attn.", ".temporal_attn.").replace(".norm1.", ".temporal_norm1.")
        if name != key and name in shapes and name not in out.state:
            out.state[name] = out.state[key].clone()
            out.how[name] = f"copied from {key}"


def _inflate_tubes(out: Converted, shapes: Mapping[str, Sequence[int]]) -> None:
    name = "patch_embed_3d.proj.weight"
    if name in shapes:
        flat = out.state.pop("patch_embed.proj.weight")
        depth = shapes[name][2]
        out.state[name] = flat.new_zeros(*flat.shape[:2], depth, *flat.shape[2:])
        out.state[name][:, :, depth // 2] = flat  # only this frame of the tube is seen at first
        out.how[name] = f"frame {depth // 2} of {depth} from patch_embed.proj.weight, others 0"
        out.state["patch_embed_3d.proj.bias"] = out.state.pop("patch_embed.proj.bias")
        out.how["patch_embed_3d.proj.bias"] = "renamed from patch_embed.proj.bias"
    if "st_embed" in shapes:
        pos = out.state["pos_embed"]
        frames = (shapes["st_embed"][1] - 1) // (pos.shape[1] - 1)
        out.state["st_embed"] = torch.cat([pos[:, :1], pos[:, 1:].repeat(1, frames, 1)], 1)
        out.how["st_embed"] = f"pos_embed repeated for {frames} frames"


def _resize_positions(pos: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """pos [1, 1+N, C] of a square grid -> [1, 1+gh*gw, C]; the class row stays."""
    side = math.isqrt(pos.shape[1] - 1)
    table = resize_grid(pos[0, 1:].float(), (side, side), grid, mode)
    return torch.cat([pos[:, :1], table[None].to(pos.dtype)], 1)


def fit_tables(out: Converted, config: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Resize the tables of a TimeSformer state dict from the sizes of `old` to those of `config`,
    as the published loader does: 1-D nearest for frames, 2-D nearest for positions."""
    if "time_embed" in out.state and config["frames"] != old["frames"]:
        table = resize_frames(out.state["time_embed"][0], config["frames"])
        out.state["time_embed"] = table[None].clone()
        out.how["time_embed"] = f"resized from {old['frames']} to {config['frames']} (nearest)"
    before = grid_of(old["image_size"], old["patch_size"])
    after = grid_of(config["image_size"], config["patch_size"])
    if before != after:
        pos = out.state["pos_embed"]
        table = resize_grid(pos[0, 1:].float(), before, after, "nearest").to(pos.dtype)
        out.state["pos_embed"] = torch.cat([pos[:, :1], table[None]], 1)
        out.how["pos_embed"] = "resized from {}x{} to {}x{} patches (nearest)".format(
            *before, *after
        )


def sizes_of(
    state: Mapping[str, Tensor], backbone: str, image_size: int | Sequence[int] | None
) -> dict[str, Any]:
    """The keywords of `create_model` that keys and shapes (in our keys) tell.

    `image_size` helps where the position table is not square. Raises InputError where a key is
    missing without which nothing can be told.
    """
    prefix = "base_model." if backbone == "xvit" else ""
    depth = 1 + max(
        (int(m[1]) for key in state if (m := re.match(rf"{prefix}blocks\.(\d+)\.", key))),
        default=-1,
    )
    tubes = "patch_embed_3d.proj.weight"
    patch = tubes if tubes in state else f"{prefix}patch_embed.proj.weight"
    needed = [f"{prefix}cls_token", f"{prefix}pos_embed", patch, f"{prefix}blocks.0.mlp.fc1.weight"]
    if backbone == "xvit":
        needed += ["base_model.temp_embed", "consensus.mlp_head.1.weight"]
    missing = [key for key in needed if key not in state]
    if missing:
        raise InputError(
            f"the checkpoint looks like a {backbone}, but lacks {', '.join(missing)}; it has "
            f"{_some(state)}"
        )
    dim = state[f"{prefix}cls_token"].shape[-1]
    hidden = state[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0]
    sizes: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "patch_size": state[patch].shape[-1],
        "mlp_ratio": _ratio(dim, hidden),
        "time_heads": "temp_head.weight" in state,
    }
    head = "consensus.head.weight" if backbone == "xvit" else "head.weight"
    if head in state:
        sizes["num_classes"] = state[head].shape[0]
    if "temp_head.weight" in state:
        sizes["frames"] = state["temp_head.weight"].shape[0]
    rows = state[f"{prefix}pos_embed"].shape[1] - 1
    table_size = _table_size(rows, sizes["patch_size"], image_size)
    if backbone == "timesformer":
        sizes["image_size"] = table_size
        sizes["attention"] = _timesformer_attention(state)
        if "time_embed" in state:
            sizes["frames"] = state["time_embed"].shape[1]
        return sizes
    sizes["table_size"] = table_size
    sizes["image_size"] = table_size if image_size is None else image_size
    sizes.update(_xvit_sizes(state) if backbone == "xvit" else _motionformer_sizes(state, rows))
    return sizes


def _motionformer_sizes(state: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
    trajectory = "blocks.0.attn.proj_kv.weight" in state
    divided = "blocks.0.timeattn.qkv.weight" in state
    joint = "st_embed" in state
    tubes = state.get("patch_embed_3d.proj.weight")
    tube = 1 if tubes is None else tubes.shape[2]
    length = (state["st_embed"].shape[1] - 1) // rows if joint else state["temp_embed"].shape[1]
    return {
        "attention": "trajectory" if trajectory else "divided" if divided else "joint",
        "position": "joint" if joint else "separate",
        "tube": tube,
        "frames": tube * length,
        "pre_logits": "tanh" if "pre_logits.fc.weight" in state else None,
    }


def _xvit_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    embed_frames = state["base_model.temp_embed"].shape[1]
    layers = {key.split(".")[2] for key in state if key.startswith("consensus.temporal_encoder.")}
    sizes: dict[str, Any] = {
        "embed_frames": embed_frames,
        "head_layers": len(layers),
        "head_width": state["consensus.mlp_head.1.weight"].shape[0],
    }
    if "temp_head.weight" not in state:
        sizes["frames"] = embed_frames
    if "base_model.pre_logits.fc.weight" in state:
        sizes["pre_logits"] = "tanh"
    return sizes


def _timesformer_attention(state: Mapping[str, Tensor]) -> str:
    if "blocks.0.temporal_attn.qkv.weight" in state:
        return "divided"
    return "joint" if "time_embed" in state else "space"


def _ratio(dim: int, hidden: int) -> float:
    ratio = hidden / dim
    # the models take the hidden width as int(dim * ratio), which rounding can bring one too low
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _table_size(
    rows: int, patch_size: int, image_size: int | Sequence[int] | None
) -> int | list[int]:
    """The image size that a position table of `rows` patches was made for."""
    if image_size is not None:
        try:
            gh, gw = grid_of(image_size, patch_size)
        except ValueError as error:
            raise InputError(str(error)) from error
        if gh * gw == rows:
            return image_size if isinstance(image_size, int) else list(image_size)
    side = math.isqrt(rows)
    if side * side != rows:
        raise InputError(
            f"the position table has {rows} patches, which is no square grid; tell its height and "
            "width in pixels with image_size=(height, width)"
        )
    return side * patch_size


def _some(state: Mapping[str, Any]) -> str:
    names = list(state)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --to -> the backbones it holds, our state dict in its keys
TARGETS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Tensor]], State]]] = {
    "time": (("timesformer", "motionformer", "xvit"), dict),
    "timesformer": (("timesformer",), to_timesformer),
    "hf": (("timesformer",), to_huggingface),
    "motionformer": (("motionformer",), _without_time_heads),
    "xvit": (("xvit",), to_xvit),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m timefast.convert",
        description="Bring a checkpoint of any known family into the form of this project, or of "
        "another family.",
        epilog="Families for --to: time, timesformer, motionformer and xvit write a file that "
        "their own loaders read (.safetensors: the bare weights), hf (Hugging Face) a folder.",
    )
    parser.add_argument("source", type=Path, help="checkpoint file, run folder or HF folder")
    parser.add_argument("dest", type=Path, help="file to write (a folder for hf)")
    parser.add_argument("--to", choices=tuple(TARGETS), help="family (default: this project)")
    parser.add_argument("--backbone", help="what an ImageNet ViT shall start")
    parser.add_argument(
        "--allow-missing", action="store_true", help="accept missing and unexpected weights"
    )
    from timefast.eval.source import add_model_flags, exit_code, model_keywords

    add_model_flags(parser)
    args = parser.parse_args(argv)
    to_console()

    def work() -> int:
        strict = not args.allow_missing
        told = {"backbone": args.backbone, "strict": strict, **model_keywords(args)}
        write_converted(args.source, args.dest, args.to, **told)
        return 0

    return exit_code(work)


def write_converted(source: Path, dest: Path, to: str | None, **options: Any) -> None:
    """Read `source` with `load_model(source, **options)` and write it to `dest`.

    Raises InputError if it cannot be read, if the family does not know the backbone, or if `dest`
    exists or cannot be written.
    """
    from timefast.weights import describe, load_model, never_read

    if dest.exists():
        raise InputError(f"{dest} exists; nothing is overwritten, name another place")
    if to != "hf" and not dest.parent.is_dir():
        raise InputError(f"{dest}: there is no folder {dest.parent}")
    model = load_model(source, **options)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    unread = never_read(source)
    if to is None:
        if dest.suffix != ".safetensors":
            raise InputError(f"{dest}: the form of this project is a .safetensors file")
        state |= {f"{KEPT}{key}": value for key, value in unread.items()}
        _write_safetensors(dest, state, {"timefast": json.dumps(describe(model))})
        return
    backbones, convert = TARGETS[to]
    if model.backbone not in backbones:
        raise InputError(f"--to {to} holds {', '.join(backbones)}, but {source} a {model.backbone}")
    foreign = convert(state)
    if to in ("motionformer", "xvit"):
        foreign |= unread
    _warn_of_normalisation(model, to)
    _warn_of_image_size(model, to)
    heads, width = model.config["heads"], model.config["dim"]
    if to != "hf" and heads * 64 != width:
        logger.warning(
            "this model has %d attention heads of width %d, which files of %s cannot say; whoever "
            "loads it takes them for 64 wide unless told otherwise (here: --heads %d)",
            heads, width // heads, to, heads,
        )  # fmt: skip
    if to == "hf":
        files = {
            "config.json": _huggingface_config(model.config, model.classes),
            "preprocessor_config.json": {
                "image_mean": model.normalisation["mean"],
                "image_std": model.normalisation["std"],
            },
        }
        try:
            dest.mkdir(parents=True)
            for name, content in files.items():
                (dest / name).write_text(json.dumps(content, indent=1), "utf-8")
        except OSError as error:
            raise InputError(f"{dest}: cannot be written ({error.strerror})") from error
        _write_safetensors(dest / "model.safetensors", foreign, {"format": "pt"})
    elif dest.suffix == ".safetensors":
        _write_safetensors(dest, foreign, {"format": "pt"})
    else:
        part = dest.with_name(f"{dest.name}.part")  # it has its name when it is whole
        try:
            torch.save({"model_state": foreign}, part)
            os.replace(part, dest)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            raise InputError(f"{dest}: cannot be written ({error})") from error
        finally:
            part.unlink(missing_ok=True)


def _warn_of_normalisation(model: Any, to: str) -> None:
    """The files of most families do not say how clips are normalised; their users just know."""
    family = {"time": f"time_{model.backbone}", "motionformer": "time_motionformer",
              "xvit": "time_xvit"}.get(to, to)  # fmt: skip
    if family == "hf":
        return  # it is written beside the weights
    mean, std = FAMILIES[family][1]
    ours = model.normalisation
    if ours != {"mean": [mean] * 3, "std": [std] * 3}:
        logger.warning(
            "this model wants clips normalised with mean %s and std %s, but %s uses mean %s, std "
            "%s and its files cannot say otherwise: tell whoever loads it",
            ours["mean"], ours["std"], to, mean, std,
        )  # fmt: skip


def _warn_of_image_size(model: Any, to: str) -> None:
    """Loaders take the size of the position table, which need not be that of the images: some
    backbones resize it as they run."""
    size, patch = model.config["image_size"], model.config["patch_size"]
    height, width = (side * patch for side in grid_of(size, patch))
    told = [side * patch for side in model.grid]
    if told != [height, width]:
        logger.warning(
            "this model is for images of %d x %d pixels, which files of %s cannot say; whoever "
            "loads it takes them for %d x %d unless told otherwise (here: --image-size %d %d)",
            height, width, to, *told, height, width,
        )  # fmt: skip


def _write_safetensors(file: Path, state: State, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, file, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be written ({error})") from error


def _huggingface_config(config: Mapping[str, Any], classes: list[str] | None) -> dict[str, Any]:
    size = config["image_size"]
    labels = classes or [f"LABEL_{i}" for i in range(config["num_classes"])]
    if not isinstance(size, int) and size[0] != size[1]:
        raise InputError(f"Hugging Face's TimeSformer is square; these weights are for {size}")
    names = {"divided": "divided_space_time", "joint": "joint_space_time", "space": "space_only"}
    return {
        "architectures": ["TimesformerForVideoClassification"],
        "model_type": "timesformer",
        "attention_type": names[config["attention"]],
        "image_size": size if isinstance(size, int) else size[0],
        "patch_size": config["patch_size"],
        "num_frames": config["frames"],
        "hidden_size": config["dim"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["heads"],
        "intermediate_size": int(config["dim"] * config["mlp_ratio"]),
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


if __name__ == "__main__":
    sys.exit(main())
