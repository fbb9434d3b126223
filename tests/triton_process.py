"""Triton without a GPU. It decides between interpreting and compiling when a kernel is defined, so each takes a process
of its own: pytest again on a test file, collecting ``interpreted_*`` or ``compiled_*`` instead of ``test_*``. The rest
of the suite never imports the kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
PART = "RIVERINFER_TEST_PART"  # "i/n": run every n-th test from the i-th on
LARGEST = 99 * 1024  # bytes of shared memory: what a program may have on every GPU since Ampere


def _interpret_faster() -> None:
    """The interpreter patches Triton's language at each launch, and again whenever a function calls another, which
    takes most of its time. Once a launch for each module that functions come from is enough."""
    from triton.runtime import interpreter

    launch, patched = interpreter.GridExecutor.__call__, set[int]()

    def begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = begin
    interpreter.InterpretedFunction.__call__ = call
    # Overflows of integers are computed, and told only in debug mode.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    _interpret_faster()


def run(arguments: list[str], cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with a clean environment, one thread, and Triton's cache in ``cache``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    env = {**clean, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)


def collect(file: str, prefix: str, cache: Path, **env: str) -> None:
    """Run the functions of a test file that begin with ``prefix``, half of them in each of two processes; all must
    pass."""
    arguments = ["-m", "pytest", "-o", f"python_functions={prefix}*", "-p", "no:cacheprovider", file]

    def part(number: int) -> subprocess.CompletedProcess[str]:
        return run(arguments, cache / str(number), **{PART: f"{number}/2"}, **env)

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(part, range(2)))
    for done in halves:
        nothing_to_do = done.returncode == 5 and done is halves[1]
        assert done.returncode == 0 or nothing_to_do, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", halves[0].stdout)


@dataclass(frozen=True)
class Compiled:
    """registers: per thread. shared: bytes a program. spills: accesses to local memory in innermost loops; elsewhere
    they cost nothing. local: bytes of local memory a thread."""

    ptx: str
    registers: int
    shared: int
    spills: int
    local: int


def compile_kernel(
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    warps: int,
    capability: int = 90,
    multiples: Iterable[str] = (),
    **options: Any,
) -> Compiled:
    """A kernel for an NVIDIA architecture, compiled without a GPU.

    types: those of the arguments that are not in ``constants``; more may be given. Arguments in neither have their
    default. Pointers start at multiples of 16 bytes, and so are the integers named in ``multiples``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    defaults = {p.name: p.default for p in function.params if p.has_default and p.name not in types}
    constants = {name: value for name, value in {**defaults, **constants}.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in set(multiples)]
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "enable_fp_fusion": False, **options}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()

        def tool(*command: str) -> str:
            arguments = [str(tools / command[0]), *command[1:], cubin.name]
            return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage")))
        spills = spills_in_loops(tool("nvdisasm", "-c"))
    local = int(usage["STACK"]) + int(usage["LOCAL"])
    return Compiled(made.asm["ptx"], int(usage["REG"]), made.metadata.shared, spills, local)


def spills_in_loops(assembly: str) -> int:
    """Accesses to local memory in innermost loops, from a label to a jump back.

    Code that was moved out of line also jumps back, over loops.
    """
    labels: dict[str, int] = {}
    lines = assembly.splitlines()
    spills = [index for index, line in enumerate(lines) if re.search(r"\b(STL|LDL)\b", line)]
    count = latest = 0
    for index, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = index
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], -1) > latest:
            latest = labels[jump[1]]
            count += sum(latest < spill < index for spill in spills)
    return count
