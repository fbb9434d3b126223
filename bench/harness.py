"""What the benchmark scripts share: the machine they ran on, intervals, tables, and files that appear whole."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import riverinfer

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "riverinfer": riverinfer.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval, over prompts as a rule."""
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(2000))
    return statistics.mean(values), means[50], means[1949]


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A markdown table and an empty line."""
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``result`` and the machine as JSON to ``folder``; the old file stays until the new one is whole."""
    path = folder / name
    aside = path.with_name(f".{name}.partial-{os.getpid()}")
    try:
        aside.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    print(f"saved {path}")
    return path
