"""Where a token's time goes, and how far that is from what the machine could do: ``riverinfer profile``."""

from riverinfer.profiling.result import Profile, load_profile

__all__ = ["Profile", "load_profile"]
