"""llama.cpp (through llama-cpp-python) as a contender for the decode benchmark.

    python bench/llama_cpp_peer.py MODEL.gguf   # a check: CPU features, greedy text, tokens/s

Timed are ``llama_decode`` and an argmax over its logits, with none of the high-level ``Llama`` class in between. It
runs in its own process, which sleeps on a pipe between its turns: llama.cpp takes a thread's AMX tile configuration to
be its own for good, and dies of SIGILL once torch's matrix products have changed it.

On a CPU with AMX, a llama.cpp compiled by an older GCC (12.2, say: its bug 114098) dies of SIGSEGV at the first prompt:
``_tile_loadconfig`` declares 8 of the 64 bytes that it reads, so the stores of the others are dropped. Build with
CXXFLAGS="-include HEADER" then, where HEADER holds

    #include <immintrin.h>
    #define _tile_loadconfig(p) __asm__ volatile("ldtilecfg %X0" ::"m"(*(const char (*)[64])(p)))
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Contender = Callable[[list[int], int], float]  # (prompt ids, new tokens) -> seconds for the tokens after the first


class LlamaCpp:
    """A GGUF in llama.cpp with its defaults: mmap, repacked weights, float16 cache, flash attention.

    extra_buffers: whether it may repack the weights, on a CPU with AMX for that; without, they stay as in the file.
    """

    def __init__(self, gguf: Path, threads: int, ctx_size: int, *, extra_buffers: bool = True) -> None:
        import llama_cpp as api

        self.api = api
        self.quiet = api.llama_log_callback(lambda *_: None)  # kept: the library goes on calling it
        api.llama_log_set(self.quiet, None)
        api.llama_backend_init()
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = extra_buffers
        self.model = api.llama_model_load_from_file(str(gguf).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {gguf}")
        self.vocab = api.llama_model_get_vocab(self.model)
        self.vocab_size = api.llama_vocab_n_tokens(self.vocab)
        context = api.llama_context_default_params()
        context.n_ctx = ctx_size
        context.n_threads = context.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context of {ctx_size} tokens")

    def step(self, ids: list[int]) -> int:
        """Appends the tokens and returns the likeliest next one; only the last token's logits are computed."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def generate(self, ids: list[int], count: int) -> tuple[list[int], float]:
        """``count`` greedy tokens, past any end of text, and the seconds from the first to the last."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        out = [self.step(ids)]
        began = time.perf_counter()
        for _ in range(count - 1):
            out.append(self.step(out[-1:]))
        return out, time.perf_counter() - began

    def encode(self, text: str) -> list[int]:
        """The text's ids, control tokens read as such, nothing added."""
        data = text.encode()
        ids = (self.api.llama_token * (len(data) + 8))()
        return ids[: self.api.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, True)]

    def decode(self, ids: list[int]) -> str:
        pieces, piece = b"", ctypes.create_string_buffer(256)
        for token in ids:
            size = self.api.llama_token_to_piece(self.vocab, token, piece, len(piece), 0, True)
            pieces += piece.raw[:size]
        return pieces.decode(errors="replace")


def llama_cpp_peer(gguf: Path, threads: int, ctx_size: int, *, extra_buffers: bool = True) -> Contender | None:
    """llama.cpp on this file, or None where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    command = [sys.executable, __file__, str(gguf), str(threads), str(ctx_size), str(int(extra_buffers))]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None
    assert worker.stdout is not None
    requests, answers = worker.stdin, worker.stdout  # the worker ends when the first is closed

    def run(ids: list[int], count: int) -> float:
        answer = ""
        if worker.poll() is None:
            print(json.dumps([ids, count]), file=requests, flush=True)
            answer = answers.readline()
        if not answer:
            raise RuntimeError(f"llama.cpp ended with status {worker.wait()}; see {__file__}")
        return float(answer)

    run([0] * 8, 2)  # loaded; several tokens, since a single one does not use AMX
    return run


def serve(peer: LlamaCpp) -> None:
    """Answers each line of ``[ids, count]`` with the seconds that it took."""
    for line in sys.stdin:
        print(peer.generate(*json.loads(line))[1], flush=True)


def check(peer: LlamaCpp) -> None:
    prompt = peer.encode("The capital of France is")
    print("llama-cpp-python", peer.api.__version__, "|", peer.api.llama_print_system_info().decode())
    print(peer.decode(peer.generate(prompt, 32)[0]))
    print("tokens/s:", " ".join(f"{127 / peer.generate(prompt, 128)[1]:.1f}" for _ in range(5)))


if __name__ == "__main__":
    if len(sys.argv) == 5:
        threads, ctx_size, extra_buffers = (int(value) for value in sys.argv[2:])
        serve(LlamaCpp(Path(sys.argv[1]), threads, ctx_size, extra_buffers=bool(extra_buffers)))
    else:
        check(LlamaCpp(Path(sys.argv[1]), threads=2, ctx_size=2048))
