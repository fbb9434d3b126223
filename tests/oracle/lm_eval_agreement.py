"""Whether ``exact`` says to lm-evaluation-harness what its own transformers back end says, on the same weights.

    python tests/oracle/lm_eval_agreement.py [--dtype float32] [MODEL_DIR]

Three tasks of our own (``lm_eval_tasks``), offline, in all three modes, prompts scored in batches and token by token.
Needs ``pip install 'riverinfer[eval]' 'lm-eval[hf]'``. Exits 1 if in float32 a log-likelihood of exact or lossless
mode is off by more than 1e-3, or a choice or a greedy answer differs. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lm_eval
import torch
from lm_eval_tasks import answers, choices, texts

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


def evaluate(model: str, **arguments: Any) -> dict[str, Any]:
    """lm-eval's results of one model on the three tasks, samples included."""
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[choices(), answers(), texts()], device="cpu", bootstrap_iters=0
    )
    assert found is not None
    return found


def likelihoods(found: dict[str, Any]) -> list[tuple[float, bool]]:
    """Every (log-likelihood, greedy) of the choices, in order."""
    return [
        (float(pair[0]), str(pair[1]) == "True")
        for sample in _samples(found, "river_choices")
        for pair in sample["filtered_resps"]
    ]


def chosen(found: dict[str, Any]) -> list[int]:
    """The likeliest end of each sentence."""
    values = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in _samples(found, "river_choices")]
    return [max(range(len(row)), key=row.__getitem__) for row in values]


def said(found: dict[str, Any]) -> list[str]:
    """The answers of the generating task."""
    return [sample["filtered_resps"][0] for sample in _samples(found, "river_answers")]


def rolled(found: dict[str, Any]) -> list[float]:
    """Log-likelihoods of whole texts."""
    return [float(sample["filtered_resps"][0]) for sample in _samples(found, "river_texts")]


def _samples(found: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def _equal(a: Sequence[Any], b: Sequence[Any]) -> str:
    return f"{sum(x == y for x, y in zip(a, b, strict=True))}/{len(a)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    folder = str(args.model_dir or demo_model())
    print(
        f"lm-eval {lm_eval.__version__}, riverinfer {riverinfer.__version__}, torch {torch.__version__}, {args.dtype}"
    )
    reference = evaluate("hf", pretrained=folder, dtype=args.dtype)
    failed = False
    for name, arguments in RUNS.items():
        got = evaluate("riverinfer", pretrained=folder, dtype=args.dtype, **arguments)
        apart = max(abs(a - b) for (a, _), (b, _) in zip(likelihoods(got), likelihoods(reference), strict=True))
        whole = max(abs(a - b) for a, b in zip(rolled(got), rolled(reference), strict=True))
        same = _equal(chosen(got), chosen(reference)), _equal(said(got), said(reference))
        greedy = _equal([g for _, g in likelihoods(got)], [g for _, g in likelihoods(reference)])
        depth = got["config"].get("mean_depth_scored")
        accuracy = got["results"]["river_choices"]["acc,none"]
        print(
            f"{name:17} log-likelihoods within {apart:.1e} (whole texts {whole:.1e}), same choices {same[0]},"
            f" greedy flags {greedy}, same answers {same[1]}, accuracy {accuracy:.3f}"
            + ("" if depth is None else f", mean depth {depth:.1f}"),
            flush=True,
        )
        exact = arguments["mode"] != "river" or arguments.get("scoring") == "prefill"
        if args.dtype == "float32" and exact:
            full = f"{len(chosen(got))}/{len(chosen(got))}"
            failed |= max(apart, whole) > LIMIT or same[0] != full
            failed |= arguments["mode"] != "river" and said(got) != said(reference)
    sys.exit(failed)


if __name__ == "__main__":
    main()
