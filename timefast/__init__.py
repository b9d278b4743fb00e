"""timefast: fast, trustworthy training of video transformers that understand time.

Importing this package imports nothing heavy: each public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timefast.models import create_model
    from timefast.patching import patch
    from timefast.weights import load_model

__version__ = "0.1.0"
__all__ = ["create_model", "load_model", "losses", "ops", "patch"]

_WHERE = {
    "create_model": "timefast.models",
    "load_model": "timefast.weights",
    "patch": "timefast.patching",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name in ("ops", "losses"):
        return import_module(f"timefast.{name}")
    raise AttributeError(f"module 'timefast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
