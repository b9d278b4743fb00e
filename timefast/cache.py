"""Where data that can be made again is kept, such as the demo data set."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`timefast` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timefast"
