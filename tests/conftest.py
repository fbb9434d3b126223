"""Shared fixtures. Everything runs on the CPU; only the tests of the demo model use the network, once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_models import ROOT, Golden
from triton_process import PART

from riverinfer import Engine
from riverinfer.cache_dir import cache_dir
from riverinfer.demo import demo_model

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only a part of the tests, where another process has the rest (``triton_process.collect``)."""
    if part := os.environ.get(PART):
        number, count = map(int, part.split("/"))
        items[:] = items[number::count]


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rivers of the tests' models stay out of the user's cache; the demo model comes from there."""
    models, folder = cache_dir() / "models", tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(models, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVERINFER_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def goldens() -> dict[str, Golden]:
    return {path.name: Golden.load(path.name) for path in sorted(ROOT.iterdir()) if path.is_dir()}


@pytest.fixture(scope="module")
def llama() -> Iterator[Engine]:
    """The tiny llama in float32, with two slots."""
    with Engine.load(ROOT / "llama", device="cpu", dtype="float32", ctx_size=256, max_sequences=2) as engine:
        yield engine


@pytest.fixture(scope="session")
def demo_dir(cache_of_the_tests: None) -> Path:
    """The demo model's folder: fetched once, then from the cache."""
    return demo_model()
