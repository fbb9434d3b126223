"""llama.cpp (through llama-cpp-python) as a contender.

    cd bench; python -m peers.llama_cpp_peer MODEL.gguf   # a check: CPU features, greedy text, tokens/s

Timed are ``llama_decode`` and an argmax over its logits, with none of the high-level ``Llama`` class in between. It
runs in its own process: llama.cpp takes a thread's AMX tile configuration to be its own for good, and dies of SIGILL
once torch's matrix products have changed it.

On a CPU with AMX, a llama.cpp compiled by an older GCC (12.2, say: its bug 114098) dies of SIGSEGV at the first prompt:
``_tile_loadconfig`` declares 8 of the 64 bytes that it reads, so the stores of the others are dropped. Build with
CXXFLAGS="-include HEADER" then, where HEADER holds

    #include <immintrin.h>
    #define _tile_loadconfig(p) __asm__ volatile("ldtilecfg %X0" ::"m"(*(const char (*)[64])(p)))
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np

from peers import Peer, Times
from peers.worker import Worker, serve


class LlamaCpp:
    """A GGUF in llama.cpp with its defaults: mmap, repacked weights, float16 cache, flash attention.

    extra_buffers: whether it may repack the weights, on a CPU with AMX for that; without, they stay as in the file.
    flash_attention: whether it may; on a CPU this can be slower than the products one by one, in long contexts.
    """

    def __init__(
        self, gguf: Path, threads: int, ctx_size: int, *, extra_buffers: bool = True, flash_attention: bool = True
    ) -> None:
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
        if not flash_attention:
            context.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = api.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context of {ctx_size} tokens")

    def version(self) -> tuple[str, str]:
        return "llama_cpp_python", self.api.__version__

    def step(self, ids: list[int]) -> int:
        """Appends the tokens and returns the likeliest next one."""
        most = self.api.llama_n_batch(self.context)
        for start in range(0, len(ids), most):
            chunk = ids[start : start + most]
            tokens = (self.api.llama_token * len(chunk))(*chunk)  # only the last one's logits are computed
            status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(chunk)))
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def write(self, ids: list[int], count: int, *, sampled: bool = False) -> Times:
        self._truncate(0)
        self.ids = ids
        return self._generate(ids, count)

    def resume(self, count: int) -> float:
        kept = len(self.ids) - 1
        self._truncate(kept)
        return self._generate(self.ids[kept:], count + 1).rest

    def _truncate(self, length: int) -> None:
        if not self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), -1, length, -1):
            raise RuntimeError(f"llama.cpp could not roll back to {length} tokens")

    def _generate(self, ids: list[int], count: int) -> Times:
        """``text``: what was said last."""
        began = time.perf_counter()
        self.text = [self.step(ids)]
        first = time.perf_counter()
        for _ in range(count - 1):
            self.text.append(self.step(self.text[-1:]))
        return Times(first - began, time.perf_counter() - first)

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


def llama_cpp_peer(
    gguf: Path, threads: int, ctx_size: int, *, extra_buffers: bool = True, flash_attention: bool = True
) -> Peer | None:
    """llama.cpp on this file, or None where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    return Worker("llama_cpp_peer", gguf.resolve(), threads, ctx_size, int(extra_buffers), int(flash_attention))


def check(peer: LlamaCpp) -> None:
    prompt = peer.encode("The capital of France is")
    print("llama-cpp-python", peer.api.__version__, "|", peer.api.llama_print_system_info().decode())
    peer.write(prompt, 32)
    print(peer.decode(peer.text))
    print("tokens/s:", " ".join(f"{127 / peer.write(prompt, 128).rest:.1f}" for _ in range(5)))


if __name__ == "__main__":
    file, *numbers = sys.argv[1:]
    if numbers:
        threads, ctx_size, extra, flash = map(int, numbers)
        serve(lambda: LlamaCpp(Path(file), threads, ctx_size, extra_buffers=bool(extra), flash_attention=bool(flash)))
    else:
        check(LlamaCpp(Path(file), threads=2, ctx_size=2048))
