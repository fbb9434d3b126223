"""Whether greedy lossless mode says what exact mode says in float32: the demo model, 20 prompts, 256 tokens each.

    python tests/oracle/lossless_float32.py [--tokens 256] [--bits 4] [--group 64]

Takes some ten minutes on two cores. A batch adds its sums in another order than single steps do: where the texts part,
the gap between the two likeliest tokens there is printed. Draft lengths are drawn at random, with a fixed seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))

from forced_drafts import force, random_plan
from lossless_prompts import PROMPTS, prompt_ids

from riverinfer import Engine, SamplingParams
from riverinfer.demo import demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    args = parser.parse_args()
    engine = Engine.load(
        demo_model(),
        device="cpu",
        dtype="float32",
        ctx_size=1024,
        max_sequences=1,
        river_bits=args.bits,
        river_group=args.group,
        draft="river",
    )
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, seed=1, logprobs=2)
    equal, largest, closest = 0, 0.0, float("inf")
    for number, prompt in enumerate(PROMPTS):
        ids = prompt_ids(engine, prompt)
        want = engine.generate(ids, params, mode="exact")
        with pytest.MonkeyPatch.context() as patch:
            force(patch, random_plan(number))
            got = engine.generate(ids, params)
        parted = next((i for i in range(args.tokens) if got.token_ids[i] != want.token_ids[i]), args.tokens)
        equal += parted == args.tokens
        gaps = [top[0][1] - top[1][1] for top in want.top_logprobs]
        closest = min(closest, *gaps)
        for a, b in zip(got.logprobs[:parted], want.logprobs[:parted], strict=True):
            largest = max(largest, abs(a - b))
        drafts = got.stats.drafts
        assert drafts is not None
        where = "equal" if parted == args.tokens else f"PARTED at token {parted}, where the gap is {gaps[parted]:.2e}"
        drafted, accepted = sum(drafts.drafted.values()), sum(drafts.accepted.values())
        print(f"{prompt.kind:15} {where}; {drafts.rounds} rounds, {accepted} of {drafted} drafts accepted", flush=True)
    print(
        f"{equal} of {len(PROMPTS)} texts equal over {args.tokens} tokens each; log-probabilities differ by at most"
        f" {largest:.1e}, the closest two likeliest tokens by {closest:.1e}"
    )
    sys.exit(equal < len(PROMPTS))


if __name__ == "__main__":
    main()
