"""A peer in a process of its own, which may be that of another Python: calls and answers are lines of JSON.

It sleeps on a pipe between its turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import Peer, Times


class Worker:
    """A ``Peer`` that a module of this package serves. Raises RuntimeError where it could not load."""

    def __init__(self, module: str, *arguments: object, python: str = sys.executable) -> None:
        self.module = module
        command = [python, "-m", f"peers.{module}", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )  # ends when its stdin is closed
        self.write([0] * 8, 2)  # loaded; several tokens, since a single one may take another path

    def _call(self, method: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        if self.process.poll() is None:
            print(json.dumps([method, *arguments]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"peers.{self.module} ended with status {self.process.wait()}; see bench/peers")
        return json.loads(answer)

    def version(self) -> tuple[str, str]:
        package, number = self._call("version")
        return package, number

    def write(self, ids: list[int], count: int, *, sampled: bool = False) -> Times:
        """Greedy always: the cost of a step does not depend on which token it took."""
        return Times(*self._call("write", ids, count))

    def resume(self, count: int) -> float:
        return float(self._call("resume", count))


def serve(make: Callable[[], Peer]) -> None:
    """In the worker: answer each line. What the engine itself prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = make()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(peer, method)(*arguments)), file=answers, flush=True)
