"""What lossless mode says of its drafts: counts that add up, in the library, in JSON and in the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from forced_drafts import draft_from, force, long_drafts, random_plan
from golden_models import ROOT
from test_lossless import load

from riverinfer import Engine, Output, SamplingParams
from riverinfer.cli import main
from riverinfer.cli.chat_commands import Commands
from riverinfer.cli.generate import format_drafts, format_stats
from riverinfer.errors import InvalidRequestError
from riverinfer.lossless import LosslessRounds
from riverinfer.outputs import Drafted, DraftStats
from riverinfer.river import RiverOptions

PARAMS = SamplingParams(max_tokens=60, ignore_eos=True, seed=1)
TEXT = "One two three four. One two three four. One two three"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load("llama") as loaded:
        yield loaded


class Rounds:
    """What the rounds of an answer were, noted beside the engine's own count."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.drafts: list[tuple[str | None, list[Drafted]]] = []
        original = LosslessRounds._draft

        def draft(rounds: LosslessRounds, room: int) -> tuple[str | None, list[Drafted], int]:
            source, drafts, match = original(rounds, room)
            self.drafts.append((source, drafts))
            return source, drafts, match

        patch.setattr(LosslessRounds, "_draft", draft)

    def judged(self, output: Output) -> list[tuple[str, int, Drafted, bool]]:
        """(source, position, draft, accepted) of every draft that was judged, from the answer alone."""
        found, at = [], 1  # the first token is no round's
        for source, drafts in self.drafts:
            if source is None:
                at += 1
                continue
            for position, draft in enumerate(drafts):
                if at == len(output.token_ids):
                    break
                accepted = draft.token == output.token_ids[at]
                found.append((source, position, draft, accepted))
                at += 1
                if not accepted:
                    break
            else:
                at += at < len(output.token_ids)  # the one more
        assert at == len(output.token_ids)
        return found


def table(pairs: list[tuple[int, bool]]) -> dict[int, list[int]]:
    """[accepted, judged] by key."""
    counts: dict[int, list[int]] = {}
    for key, accepted in pairs:
        pair = counts.setdefault(key, [0, 0])
        pair[0] += accepted
        pair[1] += 1
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_an_independent_count(seed: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, random_plan(seed))
    rounds = Rounds(monkeypatch)
    options = RiverOptions(tau=0.6) if seed % 2 else None
    output = engine.generate(TEXT, PARAMS, river=options, similarities=True)
    drafts, judged = output.stats.drafts, rounds.judged(output)
    assert drafts is not None
    river = [(position, draft, accepted) for source, position, draft, accepted in judged if source == "river"]
    assert drafts.by_position == table([(position, accepted) for position, _, accepted in river])
    assert drafts.by_confidence == table([(int(draft.confidence * 10), yes) for _, draft, yes in river])
    assert drafts.by_depth == table([(draft.depth or 0, yes) for _, draft, yes in river])
    assert sum(judged for _, judged in drafts.by_similarity.values()) == len(river)
    assert set(drafts.by_depth) == {0} if options is None else len(drafts.by_depth) > 1
    for source in ("river", "lookup"):
        assert drafts.drafted.get(source, 0) == sum(len(each) for name, each in rounds.drafts if name == source)
        accepted = sum(yes for name, _, _, yes in judged if name == source)
        assert drafts.accepted.get(source, 0) == accepted == output.sources.count(source)
    assert drafts.rounds == len(rounds.drafts)
    assert drafts.exact_steps == sum(source is None for source, _ in rounds.drafts)
    assert drafts.agreement == sum(yes for *_, yes in river) / len(river)
    # Every round but the last, which may end inside a draft, has one token that nobody drafted.
    assert output.sources.count("backbone") in (drafts.rounds, drafts.rounds + 1)
    assert output.sources[0] == "backbone"
    assert len(output.sources) == len(output.token_ids)
    assert 0 < drafts.draft_s + drafts.verify_s <= output.stats.decode_s * 1.05


def test_steps_bear_their_source(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    long_drafts(monkeypatch)
    output = Output()
    steps = list(engine.stream(TEXT, PARAMS, output=output))
    assert [step.source for step in steps] == output.sources
    assert {step.exit_depth for step in steps} == {None}
    assert {step.source for step in engine.stream(TEXT, PARAMS, mode="exact")} == {None}
    assert {step.source for step in engine.stream(TEXT, PARAMS, mode="river")} == {None}


def test_a_draft_cut_by_the_end_of_the_text_is_not_judged_further(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine.generate(TEXT, PARAMS, mode="exact")
    token = next(token for i, token in enumerate(whole.token_ids) if 3 < i == whole.token_ids.index(token))
    end = whole.token_ids.index(token)
    draft_from(monkeypatch, whole.token_ids)
    output = engine.generate(TEXT, SamplingParams(max_tokens=60, ignore_eos=True, seed=1, stop_token_ids=(token,)))
    drafts = output.stats.drafts
    assert drafts is not None
    assert sum(judged for _, judged in drafts.by_position.values()) == drafts.accepted["river"] <= end
    assert drafts.agreement == 1.0


def test_nothing_drafted_has_no_agreement(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [("none", 1)])
    drafts = engine.generate(TEXT, PARAMS).stats.drafts
    assert drafts is not None
    assert (drafts.rounds, drafts.exact_steps, drafts.drafted, drafts.agreement) == (59, 59, {}, None)
    assert format_drafts(drafts).startswith("59 rounds, 59 without a draft · drafting")


def test_similarities_are_filed_by_tenths_at_the_layer_of_the_exit() -> None:
    stats = DraftStats()
    drafts = [
        Drafted(1, 0.95, 2, (0.1, 0.72, 0.9)),
        Drafted(1, 1.0, 0, (-0.31, 0.72)),
        Drafted(1, 0.0, 3, (0.1, 0.2, float("nan"))),
        Drafted(1, 0.5, 3, (0.1, 0.2, 1.0)),
    ]
    stats.note("river", drafts, 3, 4, 0.1, 0.2)
    assert stats.by_similarity == {7: [1, 1], -4: [1, 1], 9: [0, 1]}
    assert stats.by_confidence == {9: [2, 2], 0: [1, 1], 5: [0, 1]}
    assert stats.by_position == {0: [1, 1], 1: [1, 1], 2: [1, 1], 3: [0, 1]}


# --- in the terminal --------------------------------------------------------------------------------------------

FLAGS = ["--river-group", "32", "--river-method", "rtn", "--draft", "river", "--device", "cpu", "--dtype", "float32"]
FLAGS += ["-n", "60", "--ignore-eos", "--generation-config", "none"]
MODEL = str(ROOT / "llama")


def test_json_has_them(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [("river", 4), ("lookup", 9), ("river", 1)]
    force(monkeypatch, plan)
    assert main(["generate", MODEL, "-p", TEXT, "--json", "--no-chat-template", *FLAGS]) == 0
    result = json.loads(capsys.readouterr().out)
    force(monkeypatch, plan)
    want = engine.generate(TEXT, PARAMS)
    assert (result["mode"], result["token_ids"], result["sources"]) == ("lossless", want.token_ids, want.sources)
    drafts, stats = result["stats"]["drafts"], want.stats.drafts
    assert stats is not None
    assert (drafts["drafted"], drafts["accepted"]) == (stats.drafted, stats.accepted)
    assert (drafts["rounds"], drafts["exact_steps"]) == (stats.rounds, stats.exact_steps)
    assert drafts["agreement"] == pytest.approx(stats.agreement)
    for name, key in (("by_position", "position"), ("by_confidence", "from"), ("by_depth", "depth")):
        rows: list[dict[str, Any]] = drafts[name]
        assert sum(row["judged"] for row in rows) == sum(pair[1] for pair in stats.by_position.values())
        assert [row[key] for row in rows] == sorted(row[key] for row in rows)
    assert drafts["by_similarity"] == []
    assert drafts["draft_s"] > 0 < drafts["verify_s"]


def test_exact_mode_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", MODEL, "-p", TEXT, "--json", "--mode", "exact", *FLAGS]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "sources" not in result
    assert "drafts" not in result["stats"]


def test_the_line_of_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    force(monkeypatch, [("river", 4), ("lookup", 9)])
    assert main(["generate", MODEL, "-p", TEXT, "--stats", "--no-chat-template", *FLAGS]) == 0
    shown = capsys.readouterr().err
    assert re.search(r" · drafts \d+ of \d+ river, \d+ of \d+ lookup\n", shown)
    assert re.search(r"\n\d+ rounds, \d+ without a draft · the backbone agrees with [\d.]+ % of the \d+ river", shown)


def test_stats_in_a_chat(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Notes:
        interactive = True

        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    long_drafts(monkeypatch)
    session = engine.session()
    list(session.send("Hello", PARAMS))
    terminal = Notes()
    commands = Commands(session, PARAMS, terminal)  # type: ignore[arg-type]
    commands.interpret("/stats")
    output = session.last_output
    assert output is not None
    drafts = output.stats.drafts
    assert drafts is not None
    assert terminal.said[0] == format_stats(output)
    accepted, drafted = drafts.accepted["river"], drafts.drafted["river"]
    assert f" · drafts {accepted} of {drafted} river" in terminal.said[0]
    assert format_drafts(drafts) in "\n".join(terminal.said)
    assert f"{drafts.rounds} rounds" in format_drafts(drafts)
    with pytest.raises(InvalidRequestError, match="only river mode has exit depths; start with --mode river"):
        commands.interpret("/depth")
    session.close()


def test_depths_are_refused_before_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", MODEL, "--show-depth", "-st", "-p", "x", *FLAGS]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "riverinfer: only river mode has exit depths; add --mode river\n"
