"""Where data that can be made again is kept, such as the demo data set."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`timefast` in the user's cache folder: XDG_CACHE_HOME, else ~/.cache, and for a user without
    a home a folder of that user's number among the temporary ones."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "timefast"
    try:
        return Path.home() / ".cache" / "timefast"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"timefast-{os.getuid()}"
