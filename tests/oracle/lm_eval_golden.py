"""Whether real lm-evaluation-harness takes the adapter, and its transformers back end says the same: golden llama.

    python tests/oracle/lm_eval_golden.py

Requests at the edges: empty and cut contexts, spaces at an end, texts of several windows, stop strings, chats. Needs
``pip install 'riverinfer[eval]' 'lm-eval[hf]'``. Exits 1 if a log-likelihood of float32 is off by more than 1e-3, or a
greedy flag, an answer or a chat differs. Seconds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.append(str(Path(__file__).parent.parent))

from golden_models import ROOT
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import riverinfer.evidence.lm_eval_model  # noqa: F401

LIMIT = 1e-3
MODEL = str(ROOT / "llama")
DATA = Path(__file__).parent.parent / "data" / "choices_small.jsonl"
RUNS = {
    "exact": {"mode": "exact"},
    "exact, decode": {"mode": "exact", "scoring": "decode"},
    "lossless": {},
    "lossless, decode": {"scoring": "decode"},
    "full river": {"mode": "river", "gate": "always"},
}
CHAT = [{"role": "user", "content": "hello"}]


def requests() -> dict[str, list[Instance]]:
    """By kind; contexts of 256 tokens are exceeded by each kind once."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()[:4]]
    pairs = [(row["question"], f" {choice}") for row in rows for choice in row["choices"]]
    pairs += [("", "The sun"), ("A space at the end ", "moves"), ("word " * 600, "cut from the left")]
    kwargs = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": pairs,
        "loglikelihood_rolling": [(row["question"],) for row in rows] + [("many words " * 400,)],
        "generate_until": [(row["question"], kwargs) for row in rows] + [("word " * 600, kwargs)],
    }
    return {
        kind: [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(given)]
        for kind, given in arguments.items()
    }


def evaluate(name: str, **arguments: Any) -> dict[str, Any]:
    """What a back end says to each kind of request, and how it writes a chat."""
    model = get_model(name)(pretrained=MODEL, dtype="float32", device="cpu", **arguments)
    said = {kind: getattr(model, kind)(given, disable_tqdm=True) for kind, given in requests().items()}
    return said | {"chat": model.apply_chat_template(CHAT)}


def main() -> None:
    want = evaluate("hf", max_length=256)
    failed = False
    for name, arguments in RUNS.items():
        got = evaluate("riverinfer", ctx_size=256, river_group=32, **arguments)
        pairs = list(zip(got["loglikelihood"], want["loglikelihood"], strict=True))
        apart = max(abs(ours - theirs) for (ours, _), (theirs, _) in pairs)
        greedy = all(ours == theirs for (_, ours), (_, theirs) in pairs)
        rolling = zip(got["loglikelihood_rolling"], want["loglikelihood_rolling"], strict=True)
        whole = max(abs(ours - theirs) / max(1.0, abs(theirs) / 100) for ours, theirs in rolling)
        same = got["generate_until"] == want["generate_until"]
        print(
            f"{name:16} log-likelihoods within {apart:.1e}, whole texts {whole:.1e}; greedy flags"
            f" {'equal' if greedy else 'differ'}, answers {'equal' if same else 'differ'}, chat"
            f" {'equal' if got['chat'] == want['chat'] else 'differs'}",
            flush=True,
        )
        failed |= got["chat"] != want["chat"]
        if arguments.get("mode") == "river":
            failed |= apart <= LIMIT  # exits are exercised
        else:
            failed |= not (max(apart, whole) <= LIMIT and greedy and same)
    sys.exit(failed)


if __name__ == "__main__":
    main()
