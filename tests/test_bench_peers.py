"""The contenders of the benchmarks keep to their protocol: ``write`` starts from nothing, ``resume`` from the cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import ROOT

from riverinfer import Engine

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

from contenders import RiverinferPeer  # noqa: E402
from peers import Peer  # noqa: E402
from peers.transformers_peer import transformers_peer  # noqa: E402
from peers.worker import Worker  # noqa: E402

MODEL = ROOT / "llama"
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(params=["riverinfer", "transformers"])
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Peer, list[int]]]:
    """A peer, and how many tokens each of its model's steps was for."""
    steps: list[int] = []
    if request.param == "transformers":
        peer: Any = transformers_peer(MODEL, torch.float32)
        peer.model.register_forward_pre_hook(
            lambda _, args, options: steps.append(options["input_ids"].shape[1]), with_kwargs=True
        )
        yield peer, steps
        return
    with Engine.load(MODEL, device="cpu", dtype="float32", mode="exact", max_sequences=1) as engine:
        extend = engine.extend

        def noted(sequence: Any, ids: list[int], **options: Any) -> Any:
            steps.append(len(ids))
            return extend(sequence, ids, **options)

        monkeypatch.setattr(engine, "extend", noted)
        yield RiverinferPeer(engine, "exact"), steps


def test_a_prompt_is_read_anew_and_resumed_without_being_read(watched: tuple[Peer, list[int]]) -> None:
    peer, steps = watched
    for _ in range(2):
        steps.clear()
        times = peer.write(IDS, 3)
        assert steps == [len(IDS), 1, 1]
        assert times.first > 0 < times.rest
    for _ in range(2):
        steps.clear()
        assert peer.resume(4) > 0
        assert steps == [1] * 5  # the last id, for the first token, which is not timed, and four more
    steps.clear()
    assert peer.write(IDS[:5], 1).rest == 0.0
    assert steps == [5]


def interpreter(folder: Path, code: str) -> str:
    """Runs ``code``, whatever it is asked to run."""
    (folder / "served.py").write_text(f"import sys\nsys.path.append({str(BENCH)!r})\n{code}\n")
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} {folder / 'served.py'}\n")
    path.chmod(0o755)
    return str(path)


SERVED = """
from peers.worker import serve

class Served:
    def version(self):
        print("noise")
        return "served", "1.0"

    def write(self, ids, count):
        return len(ids), count

    def resume(self, count):
        if count > 3:
            raise SystemExit(7)
        return count / 2

serve(Served)
"""


def test_a_worker_answers_from_its_own_process(tmp_path: Path) -> None:
    worker = Worker("served", python=interpreter(tmp_path, SERVED))
    assert worker.version() == ("served", "1.0")
    assert worker.write(IDS, 5) == (len(IDS), 5)
    assert worker.resume(3) == 1.5
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"peers\.served ended with status 7"):
            worker.resume(4)


def test_a_worker_that_cannot_load_is_no_contender(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with status 3"):
        Worker("served", python=interpreter(tmp_path, "raise SystemExit(3)"))
