"""Reading weights: of this project, of the families in timefast/convert.py, of ImageNet ViTs.

Every weight is accounted for in a report: loaded as it is, converted, unused by the model it comes
from, left at its initialisation, unexpected. Nothing that is read is ever executed.
"""

import argparse
import difflib
import hashlib
import json
import logging
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from timefast.checkpoint import FORMAT, list_checkpoints, newest_checkpoint, problem
from timefast.convert import (
    FAMILIES,
    KEPT,
    NEVER_READ,
    Converted,
    fit_tables,
    from_imagenet,
    recognise,
    sizes_of,
    square_patches,
    to_native,
)
from timefast.errors import InputError
from timefast.models import VideoTransformer, create_model, keywords

logger = logging.getLogger("timefast")

# ImageNet-21k pre-training, fine-tuned on ImageNet-1k: the file all published recipes start from,
# under the name it has today
IMAGENET = "timm/vit_base_patch16_224.orig_in21k_ft_in1k"


@dataclass
class LoadReport:
    """What became of every weight; kept as `model.load_report`."""

    source: str
    family: str
    sha256: str | None = None  # of the file
    loaded: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)  # our key -> what was done
    unused: dict[str, str] = field(default_factory=dict)  # foreign key -> why nothing reads it
    at_init: list[str] = field(default_factory=list)  # in the model, not in the file
    unexpected: list[str] = field(default_factory=list)  # in the file, not in the model

    def __str__(self) -> str:
        lines = [
            f"{self.source} ({self.family}): {len(self.loaded)} weights loaded, "
            f"{len(self.converted)} converted, {len(self.unused)} unused, "
            f"{len(self.at_init)} left at init, {len(self.unexpected)} unexpected"
        ]
        for title, names in (("left at init", self.at_init), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"  {title}: {_listed(names)}")
        if self.sha256:
            lines.append(f"  sha256 {self.sha256}")
        return "\n".join(lines)


@dataclass
class _Read:
    """A state dict in the words of its family, and what stood beside it."""

    state: dict[str, Tensor]
    name: str
    file: Path | None = None
    ours: dict[str, Any] | None = None  # description of a checkpoint of this project
    sizes: dict[str, Any] = field(default_factory=dict)  # from a config.json of Hugging Face
    normalisation: dict[str, list[float]] | None = None  # from a preprocessor_config.json
    classes: list[str] | None = None  # from a config.json of Hugging Face


def load_model(
    source: str | Path | Mapping[str, Any],
    *,
    backbone: str | None = None,
    strict: bool = True,
    **config: Any,
) -> VideoTransformer:
    """A model from a checkpoint of this project or of any family of timefast/convert.py.

    `source` is a file (.safetensors, or what torch.save wrote), a run or checkpoint folder, a
    folder of Hugging Face, or a state dict. Family, sizes and depth are recognised from keys and
    shapes. `config` takes the keywords of `create_model` and fills what shapes cannot tell (heads
    whose width is not 64); `frames` and `image_size` other than the file's resize its tables by
    the family's rule, another `num_classes` gives a new classifier. An ImageNet ViT needs
    `backbone`.

    Every weight is accounted for in `model.load_report`. Weights left at their initialisation and
    unexpected weights need `strict=False`. `model.normalisation` is what the family's clips are
    normalised with, `model.classes` the class names where the file has them.

    Raises InputError for files that cannot be read or would run code, families not recognised,
    shapes that do not fit, keywords that contradict the file.
    """
    read = _read(source)
    if read.ours is not None:
        return _load_ours(read, backbone, strict, config)
    family = recognise(read.state)
    home, (mean, std) = FAMILIES[family]
    if home is None and backbone is None:
        raise InputError(
            f"{read.name} holds an ImageNet ViT, which can start any backbone; tell which with "
            "backbone="
        )
    if home is not None and backbone not in (None, home):
        raise InputError(f"{read.name} holds a {home} ({family}), not a {backbone}")
    backbone = home or backbone
    assert backbone is not None
    _refuse_unknown(backbone, config)
    if family == "imagenet":
        model = _create_for_image_model(read, backbone, config)
        converted = _convert_imagenet(read.state, model)
    else:
        converted = to_native(read.state, family)
        sizes = {**sizes_of(converted.state, backbone, config.get("image_size")), **read.sizes}
        _refuse_contradictions(read.name, sizes, config, backbone)
        full = _with_heads({**sizes, **config}, read.name)
        if backbone == "timesformer":
            known = keywords(backbone)
            _fit_tables(read.name, converted, {**known, **full}, {**known, **sizes})
        model = _create(read.name, backbone, full)
        _drop_other_heads(converted, model, sizes, full)
    model.normalisation = read.normalisation or {"mean": [mean] * 3, "std": [std] * 3}
    if read.classes is not None and len(read.classes) == model.num_classes:
        model.classes = read.classes
    _apply(model, converted, LoadReport(read.name, family, _sha256(read.file)))
    _account(model, strict)
    return model


def load_imagenet(model: VideoTransformer, source: str | Path = "imagenet") -> LoadReport:
    """Start `model` from an ImageNet ViT: inflate its weights as the published code does.

    `source` is "imagenet" (the published starting point), a timm name or hub id such as
    "augreg_in1k" variants (`timm/vit_base_patch16_224.augreg_in1k`), or a local file. Files of the
    hub are fetched once and then taken from its cache. What an image model does not have (time
    embedding, temporal_fc, temporal head, heads of TIME, a classifier of another number of
    classes) keeps its initialisation. Logs id, hash and what happened; returns the report.

    Raises InputError if the file cannot be had or is not an ImageNet ViT of the model's size.
    """
    path, name = _find_imagenet(source)
    read = _read(path)
    family = recognise(read.state)
    if family != "imagenet":
        raise InputError(
            f"{name} holds a video model ({family}), not an ImageNet ViT; use timefast.load_model"
        )
    report = LoadReport(name, family, _sha256(path))
    _apply(model, _convert_imagenet(read.state, model), report)
    missing = [key for key in report.at_init if not _not_in_an_image(key)]
    if missing or report.unexpected:
        raise InputError(
            f"{name} is not an ImageNet ViT of this model's depth: it lacks "
            f"{_listed(missing)}; unexpected in it: {_listed(report.unexpected)}"
        )
    logger.info("initial weights %s", report)
    return report


def describe(model: VideoTransformer) -> dict[str, Any]:
    """What a checkpoint of this project says about its weights, JSON-able."""
    return {
        "format": FORMAT,
        "config": model.config,
        "classes": model.classes,
        "normalisation": model.normalisation,
    }


def never_read(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a published file that its own model does not read, by their names there; of a
    file of this project, those kept from the file it was converted from."""
    read = _read(source)
    if read.ours is not None:
        return {k.removeprefix(KEPT): v for k, v in read.state.items() if k.startswith(KEPT)}
    unused = to_native(read.state, recognise(read.state)).unused
    return {key: read.state[key] for key, why in unused.items() if why == NEVER_READ}


# ---- reading


def _read(source: str | Path | Mapping[str, Any]) -> _Read:
    if isinstance(source, Mapping):
        return _Read(_state_of(source, "the state dict"), "the state dict")
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder to load a model from")
    read = _Read({}, str(path), path)
    if path.is_dir():
        read.file = path = _file_in(path)
        read.name = str(path)
        if (path.parent / "config.json").exists():
            read.sizes = _huggingface_sizes(path.parent / "config.json")
            read.classes = _huggingface_classes(path.parent / "config.json")
            read.normalisation = _huggingface_normalisation(path.parent)
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        read.state = _state_of(tensors, read.name)
        read.ours = _description(metadata["timefast"], path) if "timefast" in metadata else None
    else:
        read.state = _state_of(_read_pickle(path), read.name)
    return read


def _description(text: str, file: Path) -> dict[str, Any]:
    """What `describe` wrote into a checkpoint of this project."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    whole = isinstance(found, dict) and isinstance(found.get("config"), dict)
    if not (whole and "backbone" in found["config"] and "normalisation" in found):
        raise InputError(
            f"{file} says it is a checkpoint of this project, but not of which model: its metadata "
            f"is {text[:60]!r}. Take another copy of the file"
        )
    return found


def _file_in(folder: Path) -> Path:
    """The file of weights in a run, checkpoint or Hugging Face folder."""
    if list_checkpoints(folder):
        newest = newest_checkpoint(folder)
        assert newest is not None  # it raises if all are damaged
        return newest / "model.safetensors"
    if (folder / "index.json").exists():
        wrong = problem(folder)
        if wrong is not None:
            raise InputError(f"checkpoint {folder} is damaged: {wrong}")
        return folder / "model.safetensors"
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise InputError(
        f"{folder} holds no complete checkpoint: expected checkpoints/step-<n>/index.json (a run), "
        "or model.safetensors or pytorch_model.bin with a config.json (Hugging Face)"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error})") from error


def _huggingface_normalisation(folder: Path) -> dict[str, list[float]] | None:
    file = folder / "preprocessor_config.json"
    config = _read_json(file) if file.exists() else {}
    if "image_mean" not in config or "image_std" not in config:
        return None
    return {"mean": config["image_mean"], "std": config["image_std"]}


def _huggingface_sizes(file: Path) -> dict[str, Any]:
    config = _read_json(file)
    if config.get("model_type") != "timesformer":
        raise InputError(
            f"{file}: expected model_type timesformer, got {config.get('model_type')!r}"
        )
    for name, expected in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6), ("qkv_bias", True)):
        if config.get(name, expected) != expected:
            raise InputError(f"{file}: {name}={config[name]!r} is not supported, only {expected!r}")
    if config.get("attention_type") == "space_only":
        logger.warning(
            "%s: Hugging Face's space_only gives one answer per frame; here, as in the original "
            "TimeSformer, the frames are averaged",
            file,
        )
    names = {"num_attention_heads": "heads", "image_size": "image_size", "num_frames": "frames"}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _huggingface_classes(file: Path) -> list[str] | None:
    """Class names without square brackets; None for the names that stand for having none."""
    names = _read_json(file).get("id2label") or {}
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(names))}:
        raise InputError(f"{file}: id2label does not name the classes 0 to {len(names) - 1}")
    if all(name == f"LABEL_{i}" for i, name in names.items()):
        return None
    return [str(names[str(i)]).replace("[", "").replace("]", "") for i in range(len(names))]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error})") from error


def _read_pickle(path: Path) -> Any:
    try:
        # a Namespace of options is all that stands beside the tensors of some published files
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's first line gives the advice to run the code
        told = [line.strip() for line in str(error).splitlines() if "nsupported" in line]
        if told and told[0].startswith("Unsupported operand"):  # a video, say
            raise InputError(
                f"{path} is not a complete checkpoint file (it is no file of torch.save)"
            ) from error
        reason = told[0] if told else "it holds more than tensors"
        raise InputError(
            f"{path} cannot be read without running code from it, which is refused "
            f"({reason}). Where you trust the file, load it yourself and pass its state dict."
        ) from error
    # the last three come of files that are no pickles at all
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, struct.error) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        why = "it is no file of torch.save" if isinstance(error, LookupError) else first
        raise InputError(f"{path} is not a complete checkpoint file ({why})") from error


def _state_of(value: Any, name: str) -> dict[str, Tensor]:
    """The tensors by key, out of the wrapping dict and without the prefix of DDP."""
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(wrapper), Mapping):
            value = value[wrapper]
            break
    if not isinstance(value, Mapping) or not value:
        raise InputError(f"{name}: expected a state dict, got {type(value).__name__}")
    wrong = [key for key, tensor in value.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise InputError(f"{name}: expected tensors only, but not so {_listed(wrong)}")
    state = {str(key): tensor.detach() for key, tensor in value.items()}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state


def _find_imagenet(source: str | Path) -> tuple[Path, str]:
    if source != "imagenet" and Path(source).exists():
        return Path(source), str(source)
    if isinstance(source, Path) or source.endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise InputError(f"{source}: there is no such file to take initial weights from")
    if source != "imagenet" and "/" not in source and "." not in source:
        near = difflib.get_close_matches(source, ("imagenet", "none"), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"initial weights {source!r}: there is no such file or name; {hint}Give imagenet, a "
            "timm name with its tag (vit_base_patch16_224.augreg_in1k), a hub id (owner/name) or a "
            "file; --weights also takes none"
        )
    name = IMAGENET if source == "imagenet" else source
    name = name if "/" in name else f"timm/{name}"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    try:
        return Path(hf_hub_download(name, "model.safetensors", local_files_only=True)), name
    except (LocalEntryNotFoundError, HFValidationError):
        logger.info("fetching initial weights %s", name)
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its retries would bury the one line below
    try:
        return Path(hf_hub_download(name, "model.safetensors")), name
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"initial weights {name} are neither in the cache nor to be had from the hub "
            f"({type(error).__name__}); check the name and the network, or give a local file with "
            "timm's keys, or start from nothing"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)


def _sha256(file: Path | None) -> str | None:
    if file is None:
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ---- sizes


def _load_ours(
    read: _Read, backbone: str | None, strict: bool, config: dict[str, Any]
) -> VideoTransformer:
    assert read.ours is not None
    described = dict(read.ours["config"])
    home = described.pop("backbone")
    if backbone not in (None, home):
        raise InputError(f"{read.name} holds a {home}, not a {backbone}")
    _refuse_unknown(home, config)
    _refuse_contradictions(read.name, described, config, home)
    converted = Converted({k: v for k, v in read.state.items() if not k.startswith(KEPT)})
    converted.unused = {k.removeprefix(KEPT): NEVER_READ for k in read.state if k.startswith(KEPT)}
    full = {**described, "impl": "auto", **config}
    if home != "timesformer":  # tables keep their size, whatever clip is asked for
        told = sizes_of(converted.state, home, described["image_size"])
        full |= {k: told[k] for k in ("table_size", "embed_frames") if k in told}
    if home == "timesformer":
        _fit_tables(read.name, converted, full, described)
    model = _create(read.name, home, full)
    _drop_other_heads(converted, model, described, full)
    model.normalisation = read.ours["normalisation"]
    model.classes = read.ours.get("classes")
    _apply(model, converted, LoadReport(read.name, "timefast", _sha256(read.file)))
    _account(model, strict)
    return model


def _create_for_image_model(read: _Read, backbone: str, config: dict[str, Any]) -> VideoTransformer:
    sizes = sizes_of(square_patches(read.state), "timesformer", None)
    told = {key: sizes[key] for key in ("dim", "depth", "patch_size", "mlp_ratio")}
    _refuse_contradictions(read.name, told, config, backbone)
    full = _with_heads({"image_size": sizes["image_size"], **told, **config}, read.name)
    if "num_classes" in sizes:
        full.setdefault("num_classes", sizes["num_classes"])
    return _create(read.name, backbone, full)


def _create(name: str, backbone: str, config: dict[str, Any]) -> VideoTransformer:
    try:
        return create_model(backbone, **config)
    except (ValueError, TypeError) as error:  # the latter: a keyword of another type
        raise InputError(f"{name}: no {backbone} can be made of it: {error}") from error


def _fit_tables(
    name: str, converted: Converted, config: Mapping[str, Any], old: Mapping[str, Any]
) -> None:
    try:
        fit_tables(converted, config, old)
    except ValueError as error:
        raise InputError(f"{name}: its tables cannot be resized: {error}") from error


def _convert_imagenet(state: dict[str, Tensor], model: VideoTransformer) -> Converted:
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return from_imagenet(state, model.backbone, shapes, model.grid)


def _with_heads(config: dict[str, Any], name: str) -> dict[str, Any]:
    """No shape tells the number of attention heads, but all published models have width 64."""
    if "heads" in config:
        return config
    if config["dim"] % 64:
        raise InputError(
            f"{name}: width {config['dim']} does not tell how many attention heads it has; pass "
            "heads= (a command: --heads)"
        )
    return {**config, "heads": config["dim"] // 64}


def _refuse_unknown(backbone: str, config: Mapping[str, Any]) -> None:
    known = keywords(backbone)
    unknown = [name for name in config if name not in known]
    if unknown:
        raise InputError(
            f"a {backbone} takes no keyword {_listed(unknown)} (it takes {', '.join(known)})"
        )
    for name in ("frames", "num_classes"):
        if name in config and not _counts(config[name]):
            raise InputError(f"{name}: expected a number from 1 on, got {config[name]!r}")
    size = config.get("image_size", 1)
    pair = isinstance(size, list | tuple) and len(size) == 2
    if not all(map(_counts, size if pair else [size])):
        raise InputError(f"image_size: expected pixels or (height, width), got {size!r}")


def _counts(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


# what a checkpoint may be asked to become, beside what its shapes tell; models with tables that
# are resized at run time take any image size
_ADAPTABLE = {
    "frames", "image_size", "num_classes", "time_heads", "init", "impl", "drop_path", "pre_logits",
}  # fmt: skip


def _refuse_contradictions(
    name: str, told: Mapping[str, Any], config: Mapping[str, Any], backbone: str
) -> None:
    there, wanted = told.get("frames"), config.get("frames")
    if backbone == "motionformer" and None not in (there, wanted) and there != wanted:
        raise InputError(
            f"{name} holds a motionformer of {there} frames; no rule was published for resizing "
            f"its table to {wanted}"
        )
    for key, value in config.items():
        if key in told and key not in _ADAPTABLE and _plain(told[key]) != _plain(value):
            raise InputError(f"{name} holds a {backbone} with {key}={told[key]}, not {value}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _drop_other_heads(
    converted: Converted,
    model: VideoTransformer,
    told: Mapping[str, Any],
    full: Mapping[str, Any],
) -> None:
    """Take out the heads that the caller's keywords replace by new ones."""
    replaced: list[tuple[str, str]] = []
    if "num_classes" in told and model.num_classes != told["num_classes"]:
        why = f"the classifier of {told['num_classes']} classes"
        replaced += [("head.", why), ("consensus.head.", why)]
    if not full["time_heads"]:
        heads = ("temp_head.", "mlp_q.", "mlp_k.", "mlp_v.", "mlp_proj.", "mlp_norm.", "flow_head.")
        replaced += [(head, "made with time_heads=False") for head in heads]
    elif "temp_head.weight" in converted.state:
        positions = len(converted.state["temp_head.weight"])
        if positions != len(model.state_dict()["temp_head.weight"]):
            replaced += [("temp_head.", f"the order head of {positions} frames")]
    for key in list(converted.state):
        for prefix, why in replaced:
            if key.startswith(prefix):
                converted.unused[key] = why
                del converted.state[key]


# ---- accounting


@torch.no_grad()
def _apply(model: VideoTransformer, converted: Converted, report: LoadReport) -> None:
    """Copy what fits in name and shape; a shape that does not fit raises before any copy."""
    own = model.state_dict()
    wrong = [
        f"{key}: expected {list(own[key].shape)}, got {list(value.shape)}"
        for key, value in converted.state.items()
        if key in own and own[key].shape != value.shape
    ]
    if wrong:
        raise InputError(
            f"{report.source} ({report.family}): {len(wrong)} weights do not have the model's "
            "shape:\n  " + "\n  ".join(wrong[:10])
        )
    for key, value in converted.state.items():
        if key not in own:
            report.unexpected.append(key)
            continue
        own[key].copy_(value)  # also widens float16
        if key in converted.how:
            report.converted[key] = converted.how[key]
        else:
            report.loaded.append(key)
    report.unused = converted.unused
    report.at_init = [key for key in own if key not in converted.state]
    model.load_report = report


def _account(model: VideoTransformer, strict: bool) -> None:
    report = model.load_report
    assert report is not None
    if strict and (report.at_init or report.unexpected):
        raise InputError(
            f"{report}\nPass strict=False (a command: --set strict=false) to accept that these "
            "weights start from their initialisation, or are dropped."
        )
    logger.info("%s", report)


def _not_in_an_image(key: str) -> bool:
    """Whether an image model cannot have this weight of a video model."""
    parts = (
        "temporal_fc", "time_embed", "temp_embed", "temp_head", "mlp_q", "mlp_k", "mlp_v",
        "mlp_proj", "mlp_norm", "flow_head", "head", "consensus", "proj_q", "proj_kv",
        "pre_logits", "timeattn", "norm3",
    )  # fmt: skip
    return any(part in parts for part in key.split("."))


def _listed(names: Sequence[Any]) -> str:
    text = ", ".join(str(name) for name in names[:8])
    return (text + f" and {len(names) - 8} more" if len(names) > 8 else text) or "nothing"
