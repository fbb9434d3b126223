"""Word problems: answers found in texts, files of GSM8K and MATH, and how a question is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluated import GSM, load

from riverinfer import Engine
from riverinfer.errors import InvalidRequestError
from riverinfer.evidence.benchmark import Item, ask
from riverinfer.evidence.final_answer import final_answer, same_answer
from riverinfer.evidence.gsm import read_problems, word_problems


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 1. Add\n3 + 4\n#### $1,200.50 in all, of 3 parts", "1,200.50"),
        ("first 5, then -12.", "-12"),
        ("so \\boxed{\\frac{1}{\\sqrt{2}}} follows from 3", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{1} no, \\boxed {2}, and \\boxed{3", "2"),
        ("no idea", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,200", "1200.0"),
        ("$18", "18"),
        ("18.", "18"),
        ("\\dfrac{1}{2}", "\\frac12"),
        ("1/2", "\\frac{1}{2}"),
        ("x = 5", "5"),
        ("5\\text{ cm}", "5"),
        ("\\text{east}", "east"),
        ("90^\\circ", "90"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        (".5", "0.50"),
        ("\\frac{-1}{3}", "-\\frac{1}{3}"),
        ("10\\%", "10"),
        ("-0", "0"),
    ],
)
def test_answers_written_otherwise(one: str, other: str) -> None:
    assert same_answer(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(None, "1"), ("1", "-1"), ("10", "1"), ("(1,2)", "12"), ("NaN", "1"), ("x+1", "1+x"), ("\\leftarrow", "arrow")],
)
def test_other_answers(one: str | None, other: str) -> None:
    assert not same_answer(one, other)


def test_word_problems() -> None:
    benchmark = word_problems("GSM8K", GSM, shots=2, limit=3)
    first = benchmark.items[0]
    assert (benchmark.shots, len(benchmark.items), first.name) == (2, 3, "GSM8K/2")
    assert [role for role, _ in first.chat] == ["user", "assistant", "user", "assistant", "user"]
    assert "3 + 5 = 8 apples.\n#### 8" in first.chat[1][1]
    assert first.text.startswith("Question: Lena")
    assert first.text.endswith("How many euros are left?\nAnswer:")
    assert (first.text.count("Question:"), first.text.count("####")) == (3, 2)
    assert first.stop == ("Question:",)
    assert benchmark.score(["so 9", "#### 18", "nothing"], "exact") == [True, False, False]
    assert len(word_problems("GSM8K", GSM).items) == 20, "as many examples as in the paper"
    assert len(word_problems("GSM8K", GSM, shots=0).items[0].chat) == 1


def test_math_problems(tmp_path: Path) -> None:
    file = tmp_path / "math.jsonl"
    rows = [
        {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        {"problem": "Two?", "solution": "See above.", "answer": "2"},
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    assert [problem.answer for problem in read_problems("MATH", file)] == ["\\frac{1}{2}", "2"]
    benchmark = word_problems("MATH", file, shots=1)
    assert benchmark.items[0].text == (
        "Problem:\nHalf of one?\n\nSolution: It is $\\boxed{\\frac{1}{2}}$.\n\nProblem:\nTwo?\n\nSolution:"
    )
    assert benchmark.score(["\\boxed{2}"], "exact") == [True]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "line 1 is not JSON"),
        ('\n{"question": "q"}', "line 2 has no question or no answer"),
        ('["q"]', "line 1 has no question"),
        ('{"question": "q", "answer": "none"}', "line 1 has no answer"),
        ("[" * 100_000, "line 1 is nested too deeply"),
        ("", "has 0 problems"),
    ],
)
def test_bad_problem_files(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        word_problems("GSM8K", file, shots=0)
    assert caught.value.file == str(file)


def test_problem_files_from_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "gsm.jsonl"
    rows = [{"question": f"One\u2028and {n}?", "answer": f"#### {n + 1}"} for n in range(2)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [(each.question, each.answer) for each in read_problems("GSM8K", file)] == [
        ("One\u2028and 0?", "1"),
        ("One\u2028and 1?", "2"),
    ]
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidRequestError, match=r"gsm.jsonl: is not UTF-8 text; give"):
        read_problems("GSM8K", file)


def test_a_base_model_stops_at_the_next_question(engine: Engine) -> None:
    item = Item("x", (("user", "hello"),), "Question: hello", ("Question:",))
    ids, params = ask(engine, item, chat=False, max_tokens=7)
    assert (ids, params.stop, params.max_tokens, params.temperature) == (
        engine.tokenizer.encode("Question: hello"),
        ("Question:",),
        7,
        0.0,
    )
    ids, params = ask(engine, item, chat=True, max_tokens=7)
    shown = engine.session().prompt_text([{"role": "user", "content": "hello"}])
    assert (ids, params.stop) == (engine.tokenizer.encode(shown, add_special_tokens=False), ())
