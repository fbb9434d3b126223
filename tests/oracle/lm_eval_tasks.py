"""Two small tasks of our own for lm-evaluation-harness: what its hub data sets are used for, without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "data"


def choices() -> dict[str, Any]:
    """24 sentences with four ends each, the right one marked."""
    return {
        **_task("river_choices", DATA / "choices_small.jsonl"),
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def answers() -> dict[str, Any]:
    """12 questions with one word for an answer, which ends at the line's."""
    return {
        **_task("river_answers", DATA / "answers_small.jsonl"),
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    }


def texts() -> dict[str, Any]:
    """The questions of ``choices`` as running text, for their perplexity."""
    return {
        **_task("river_texts", DATA / "choices_small.jsonl"),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[label]}}.",
        "metric_list": [{"metric": "word_perplexity"}],
    }


def _task(name: str, file: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
