"""``riverinfer audit``: what leaving the backbone early costs on this model, and whether the gate earns its keep."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from riverinfer.cli.output_file import output_path, write_whole
from riverinfer.cli.setup import load_engine, refuse_idle_gate_flags, use_huge_pages
from riverinfer.errors import InvalidRequestError
from riverinfer.progress import ConsoleProgress

if TYPE_CHECKING:
    from riverinfer.evidence.audit import Audit, AuditSettings


def run(args: argparse.Namespace) -> int:
    """Measure, write the files that were asked for, print the summary or the JSON."""
    use_huge_pages()
    # Before a model is loaded, refuse what could not be done or written at the end.
    places = {
        name: output_path(getattr(args, name), suffixes)
        for name, suffixes in (("save", (".json",)), ("report", (".html",)))
        if getattr(args, name) is not None
    }
    refuse_idle_gate_flags(args)
    settings = _settings(args)
    report_html = _report() if "report" in places else None
    from riverinfer.evidence.prompts import different, read_prompts, require_two

    texts = different(read_prompts(args.prompts))
    require_two(texts)
    audit = _measure(args, texts, settings)
    if args.json:
        print(audit.as_json().rstrip("\n"), flush=True)
    else:
        from riverinfer.evidence.summary import terminal

        print(terminal(audit, width=_width()).rstrip("\n"), flush=True)
    for name, path in places.items():
        content = report_html(audit) if name == "report" and report_html is not None else audit.as_json()
        write_whole(path, content.encode("utf-8", errors="replace"))
        print(f"riverinfer: wrote {path}", file=sys.stderr)
    return 0


def _settings(args: argparse.Namespace) -> AuditSettings:
    from riverinfer.evidence.audit import AuditSettings

    given = {name: value for name in ("repair", "taus") if (value := getattr(args, name)) is not None}
    return AuditSettings(
        tokens=args.tokens,
        drift_tokens=args.drift_tokens,
        drift_texts=args.drift_texts,
        gates=not args.no_gates,
        seed=args.seed,
        **given,
    )


def _measure(args: argparse.Namespace, texts: list[str], settings: AuditSettings) -> Audit:
    from riverinfer.evidence.audit_run import run_audit
    from riverinfer.evidence.drift import SLOTS
    from riverinfer.evidence.prompts import prompt_ids

    # No walk reads the engine's own repair; a certificate for --tau auto is about one.
    args.repair = args.repair or 0
    with load_engine(args, max_sequences=SLOTS) as engine:
        if engine.mode != "river":
            raise InvalidRequestError(
                "could certify nothing, so there is no setting to audit",
                field="--tau auto",
                remedy="give --tau a number",
            )
        prompts = prompt_ids(engine, texts)
        return run_audit(engine, prompts, settings, progress=ConsoleProgress(quiet_s=1.0))


def _report() -> Callable[[Audit], str]:
    """What draws the page; the pictures' library is asked for before anything is measured."""
    from riverinfer.heat_map import require_matplotlib

    require_matplotlib()
    report_html: Callable[[Audit], str] = import_module("riverinfer.evidence.report").report_html
    return report_html


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
