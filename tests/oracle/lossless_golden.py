"""Whether greedy lossless mode says what exact mode says in float32: every golden model, 20 prompts, 256 tokens each.

    python tests/oracle/lossless_golden.py

About a minute. Prompts of 1 to 172 random tokens, draft lengths drawn at random, with fixed seeds; fewer tokens where
a model's context is shorter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))

from forced_drafts import force, random_ids, random_plan
from golden_models import NAMES
from test_lossless import load

from riverinfer import SamplingParams


def main() -> None:
    parted = 0
    for name in NAMES:
        equal, tokens = 0, 0
        with load(name, ctx_size=0) as engine:
            for number in range(20):
                ids = random_ids(1 + 9 * number, number)
                count = min(256, engine.ctx_size - len(ids) - 1)
                params = SamplingParams(max_tokens=count, ignore_eos=True, seed=1)
                want = engine.generate(ids, params, mode="exact")
                with pytest.MonkeyPatch.context() as patch:
                    force(patch, random_plan(number))
                    got = engine.generate(ids, params)
                equal += got.token_ids == want.token_ids
                tokens += count
        parted += 20 - equal
        print(f"{name}: {equal} of 20 texts equal, {tokens} tokens", flush=True)
    sys.exit(parted > 0)


if __name__ == "__main__":
    main()
