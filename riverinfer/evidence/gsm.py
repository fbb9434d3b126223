"""Word problems from a JSONL file: GSM8K ("question", "answer" ending in "#### 42") and MATH ("problem", "solution").

GSM8K: arXiv 2110.14168. MATH: arXiv 2103.03874. Neither comes with riverinfer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from riverinfer.errors import InvalidRequestError
from riverinfer.evidence.benchmark import Benchmark, Item
from riverinfer.evidence.final_answer import final_answer, same_answer
from riverinfer.evidence.paper_figures import SHOTS
from riverinfer.evidence.prompts import parse_line, read_lines

_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator, which no answer needs


@dataclass(frozen=True)
class _Form:
    """How a benchmark's file names its fields, and how its questions are asked."""

    question: str
    solution: str
    instruction: str
    layout: str
    stop: str


_FORMS = {
    "GSM8K": _Form(
        "question",
        "answer",
        "Solve the problem step by step. End with a line that has #### and the answer, a number.",
        "Question: {question}\nAnswer:{solution}",
        "Question:",
    ),
    "MATH": _Form(
        "problem",
        "solution",
        "Solve the problem step by step. Put the final answer in \\boxed{}.",
        "Problem:\n{question}\n\nSolution:{solution}",
        "Problem:",
    ),
}


@dataclass(frozen=True)
class Problem:
    """A question, a solution that reasons, and the answer it ends with."""

    question: str
    solution: str
    answer: str


def read_problems(name: str, path: Path) -> list[Problem]:
    """The problems of a JSONL file, an object a line: of "GSM8K" or "MATH", whose answer may also stand in "answer".

    Raises InvalidRequestError naming file and line.
    """
    form = _FORMS[name]
    found = []
    for number, line in read_lines(path):
        fields = parse_line(path, number, line)
        question, solution, given = (
            fields.get(key) if isinstance(fields, dict) else None for key in (form.question, form.solution, "answer")
        )
        if not (isinstance(question, str) and isinstance(solution, str) and question.strip() and solution.strip()):
            raise InvalidRequestError(
                f"line {number} has no {form.question} or no {form.solution}", file=path, remedy=f"give {name}'s fields"
            )
        answer = given if name == "MATH" and isinstance(given, str) else final_answer(solution)
        if answer is None:
            raise InvalidRequestError(f"line {number} has no answer", file=path, remedy="end it with #### or \\boxed{}")
        found.append(Problem(question.strip(), _CALCULATOR.sub("", solution).strip(), answer))
    return found


def word_problems(name: str, path: Path, *, shots: int | None = None, limit: int | None = None) -> Benchmark:
    """ "GSM8K" or "MATH" from a file. Its first ``shots`` problems (None: as many as the paper showed) come solved
    before each of the others, which are asked; at most ``limit`` of them.

    Raises InvalidRequestError for a file that cannot be read or has no more problems than examples.
    """
    form, count = _FORMS[name], SHOTS[name] if shots is None else shots
    problems = read_problems(name, path)
    examples, asked = problems[:count], problems[count:][:limit]
    if not asked:
        raise InvalidRequestError(
            f"has {len(problems)} problems, of which {count} would be examples",
            file=path,
            remedy="give more, or fewer --shots",
        )

    def user(problem: Problem) -> tuple[str, str]:
        return "user", f"{problem.question}\n\n{form.instruction}"

    chat: list[tuple[str, str]] = []
    text = ""
    for example in examples:
        chat += [user(example), ("assistant", example.solution)]
        text += form.layout.format(question=example.question, solution=" " + example.solution) + "\n\n"

    def score(answers: Sequence[str], _: str) -> list[bool]:
        return [same_answer(final_answer(said), problem.answer) for said, problem in zip(answers, asked, strict=True)]

    items = tuple(
        Item(
            f"{name}/{number}",
            (*chat, user(problem)),
            text + form.layout.format(question=problem.question, solution=""),
            (form.stop,),
        )
        for number, problem in enumerate(asked, len(examples))
    )
    return Benchmark(name, str(path), len(examples), items, score)
