"""Peers on the same card: transformers as it is, and compiled with a static cache. Greedy tokens a second, batch 1.

Llama-3.2-1B's shapes with random weights, and the model folder if there is one. The tokens counted begin some steps
after the prompt, once whatever is recorded at the start of a text is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils
from gpu_models import LLAMA_1B, TINY, Shape
from gpu_run import DEVICE, DRY, Part, Results, Setting, release, synchronize

SKIPPED, COUNTED = (1, 3) if DRY else (8, 64)
PROMPT = 8 if DRY else 64


def peers(part: Part, setting: Setting) -> None:
    try:
        import transformers
    except Exception as error:  # broken installations raise what they like
        print(f"transformers is left out: {type(error).__name__}: {error}")
        part.results["left out"] = f"{type(error).__name__}: {error}"
        part.save()
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shape = TINY if DRY else LLAMA_1B
    models: dict[str, Callable[[], Any]] = {f"{shape.name}, random weights": partial(_random, shape)}
    if setting.model is not None:
        models[setting.model.name] = partial(_stored, setting.model)
    print("| model | transformers | tokens/s | ready after, s |\n|---|---|---|---|", flush=True)
    for way in ("eager", "compiled"):
        for name, build in models.items():
            found = part.attempt(f"{name} {way}", partial(_rate, build, way == "compiled"), needs=15)
            if found:
                print(f"| {name} | {way} | {found['tokens_per_s']:.0f} | {found['ready_s']:.0f} |", flush=True)
            release()


def _random(shape: Shape) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _stored(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)


def _rate(build: Callable[[], Any], compiled: bool) -> Results:
    from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        """Never stops. Notes the time after SKIPPED tokens, when the device has come so far."""

        seen = 0
        began = 0.0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.seen += 1
            if self.seen == SKIPPED + 1:
                synchronize()
                self.began = time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    started = time.perf_counter()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompt = torch.arange(5, 5 + PROMPT, device=DEVICE)[None]
    total = 1 + SKIPPED + COUNTED
    options: Results = {"max_new_tokens": total, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    if compiled:
        compiling = CompileConfig(backend="eager", mode=None) if DRY else CompileConfig(mode="reduce-overhead")
        compiling._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compiling}

    def say() -> tuple[float, int]:
        clock = Clock()
        with torch.no_grad():
            out = model.generate(prompt, stopping_criteria=StoppingCriteriaList([clock]), **options)
        synchronize()
        return time.perf_counter() - clock.began, out.shape[1] - prompt.shape[1]

    for _ in range(1 if DRY else 3):
        say()
    ready = time.perf_counter() - started
    frames = torch._dynamo.utils.counters["frames"].get("ok", 0)
    assert not compiled or frames, "nothing was compiled"
    timed = [say() for _ in range(1 if DRY else 3)]
    assert all(count == total for _, count in timed), "the text ended before its time"
    return {"tokens_per_s": COUNTED / min(seconds for seconds, _ in timed), "ready_s": ready, "frames": frames}
