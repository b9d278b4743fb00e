"""Reading golden files, and the rule that makes the full-size weights and inputs from their names.

tests/golden/README.md says where the files come from, what their keys mean and the tolerances.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


@cache
def read_golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and configuration of tests/golden/<name>.safetensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(  # noqa: SIM118
            file.metadata()["config"]
        )


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below `prefix/`, by the rest of their names."""
    return {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(prefix)}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = ""):
    """Largest difference against the largest value of the expected tensor."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    error = (actual.detach() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{what}: relative difference {error:.2e} > {tolerance:.0e}"


def rule_state(config: dict) -> dict[str, torch.Tensor]:
    """All weights of a full-size model."""
    return {
        key: _rule_weight(config["salt"], key, tuple(shape))
        for key, shape in config["state_shapes"].items()
    }


def rule_video(config: dict) -> torch.Tensor:
    """Input video [1, 3, 8, 224, 224] of a full-size file."""
    values = _uniform(config["salt"] + "input/video", 8 * 3 * 224 * 224)
    return torch.from_numpy(values.astype(np.float32)).view(1, 8, 3, 224, 224).transpose(1, 2)


def _rule_weight(salt: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    u = _uniform(salt + key, int(np.prod(shape)))
    if len(shape) == 1:
        values = 1 + 0.3 * u if key.endswith("weight") else 0.3 * u
    elif key.split(".")[-1] in (
        "cls_token", "pos_embed", "time_embed", "temp_embed", "st_embed",
    ):  # fmt: skip
        values = 0.8 * u
    else:
        sharp = any(name in key for name in ("qkv", "proj_q", "proj_kv", "mlp_q.", "mlp_k."))
        values = (1.5 if sharp else 1.0) * np.sqrt(3 / np.prod(shape[1:])) * u
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def _uniform(name: str, count: int) -> np.ndarray:
    """Values in [-1, 1): FNV-1a of the name, then one splitmix64 output per element."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return 2 * ((z >> np.uint64(40)).astype(np.float64) / 2**24) - 1
