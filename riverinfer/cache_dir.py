"""Where riverinfer keeps what it makes: ``$RIVERINFER_CACHE``, else the platform's user cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path, user_state_path


def cache_dir() -> Path:
    """The cache folder; not created here."""
    chosen = os.environ.get("RIVERINFER_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("riverinfer", appauthor=False)


def history_file() -> Path:
    """The chat's input history: beside the cache if that was chosen, else in the platform's user state folder."""
    if os.environ.get("RIVERINFER_CACHE"):
        return cache_dir() / "chat_history"
    return user_state_path("riverinfer", appauthor=False) / "chat_history"
