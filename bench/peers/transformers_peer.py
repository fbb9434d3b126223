"""``transformers`` as a contender: ``generate``, as its users call it, timed by a streamer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from peers import Peer, Times


def transformers_peer(folder: Path, dtype: torch.dtype) -> Peer | None:
    """The model in eager mode with the library's defaults; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    class Clock(transformers.generation.streamers.BaseStreamer):
        """Notes when each token came; the first call is for the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    class Transformers:
        def __init__(self) -> None:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

        def version(self) -> tuple[str, str]:
            return "transformers", transformers.__version__

        def write(self, ids: list[int], count: int, *, sampled: bool = False) -> Times:
            self.ids, self.cache = ids, transformers.DynamicCache(config=self.model.config)
            return self._generate(count, sampled)

        def resume(self, count: int) -> float:
            self.cache.crop(len(self.ids) - 1 - self.cache.get_seq_length())  # negative: how many to take back
            return self._generate(count + 1, False).rest

        def _generate(self, count: int, sampled: bool) -> Times:
            prompt, clock = torch.tensor([self.ids]), Clock()
            sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
            began = time.perf_counter()
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=self.cache,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=sampled,
                streamer=clock,
                **sampling,
            )
            _, first, *rest = clock.times
            assert len(rest) == count - 1
            return Times(first - began, rest[-1] - first if rest else 0.0)

    return Transformers()
