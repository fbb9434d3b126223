"""OpenVINO GenAI as a contender: a GGUF file on the CPU, read as it is, in a process of its own.

It has its defaults but for prefix caching: by default a prompt is served from the cache of an earlier one. So prompts
are timed in a pipeline without that, and steps after a cached prompt in a second one with it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from peers import Peer, Times
from peers.worker import Worker, serve


class OpenVino:
    def __init__(self, gguf: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self.api, self.tensor = openvino_genai, openvino.Tensor
        self.plain = self._pipeline(gguf, threads, False)
        self.caching = self._pipeline(gguf, threads, True)

    def _pipeline(self, gguf: str, threads: int, caching: bool) -> Any:
        scheduler = self.api.SchedulerConfig()
        scheduler.enable_prefix_caching = caching
        scheduler.max_num_batched_tokens = sys.maxsize  # a prompt in one piece, as without a scheduler's configuration
        return self.api.LLMPipeline(gguf, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    def version(self) -> tuple[str, str]:
        return "openvino-genai", self.api.__version__

    def write(self, ids: list[int], count: int, *, sampled: bool = False) -> Times:
        self.ids, self.cached = ids, False
        return self._generate(self.plain, count)

    def resume(self, count: int) -> float:
        if not self.cached:
            self._generate(self.caching, 1)
            self.cached = True
        return self._generate(self.caching, count + 1).rest

    def _generate(self, pipeline: Any, count: int) -> Times:
        import numpy as np

        config = self.api.GenerationConfig(max_new_tokens=count, min_new_tokens=count, ignore_eos=True, do_sample=False)
        result = pipeline.generate(self.tensor(np.array([self.ids], dtype=np.int64)), config)
        assert len(result.tokens[0]) == count
        metrics = result.perf_metrics
        rest = metrics.get_tpot().mean * (count - 1) if count > 1 else 0.0
        return Times(metrics.get_ttft().mean / 1000, rest / 1000)


def openvino_peer(gguf: Path, threads: int, python: str | None = None) -> Peer | None:
    """``python``: of an environment that has openvino-genai; None takes this one, and gives None where it has not."""
    if python is None and importlib.util.find_spec("openvino_genai") is None:
        return None
    return Worker("openvino_peer", gguf.resolve(), threads, python=python or sys.executable)


if __name__ == "__main__":
    serve(lambda: OpenVino(sys.argv[1], int(sys.argv[2])))
