"""One start for ``load.py``, in a process of its own: imports, load, first token.

    python bench/load_worker.py riverinfer|transformers|llama_cpp OPTIONS

OPTIONS is JSON. Prints the three times at which a stage was over, by the system's monotonic clock, as JSON. Only what
the engine itself needs is imported, and only when it is its turn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


def riverinfer(folder: str, mode: str, threads: int, ctx_size: int, prompt: str, **options: Any) -> Iterator[None]:
    from riverinfer import Engine, SamplingParams

    yield
    settings = {"device": "cpu", "dtype": "bfloat16", "ctx_size": ctx_size, "max_sequences": 1, "threads": threads}
    engine = Engine.load(folder, mode=mode, **settings, **options)
    yield
    next(iter(engine.stream(prompt, SamplingParams(max_tokens=1, ignore_eos=True))))
    yield


def transformers(folder: str, threads: int, prompt: str) -> Iterator[None]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    yield
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    yield
    model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=1, do_sample=False)
    yield


def llama_cpp(gguf: str, threads: int, ctx_size: int, prompt: str, extra_buffers: bool) -> Iterator[None]:
    from importlib import import_module
    from pathlib import Path

    from peers.llama_cpp_peer import LlamaCpp

    import_module("llama_cpp")  # the class imports it when it is made

    yield
    peer = LlamaCpp(Path(gguf), threads, ctx_size, extra_buffers=extra_buffers)
    yield
    peer.step(peer.encode(prompt))
    yield


if __name__ == "__main__":
    engines: dict[str, Callable[..., Iterator[None]]]
    engines = {"riverinfer": riverinfer, "transformers": transformers, "llama_cpp": llama_cpp}
    print(json.dumps([time.monotonic() for _ in engines[sys.argv[1]](**json.loads(sys.argv[2]))]))
