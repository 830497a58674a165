"""Where measurements of a device are kept: `$BACKFUSE_CACHE`, by default `~/.cache/backfuse`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The folder; it need not exist."""
    folder = os.environ.get("BACKFUSE_CACHE")
    base = Path(folder) if folder else Path("~/.cache/backfuse")
    try:
        return base.expanduser()
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir(), f"backfuse-{os.getuid()}")
