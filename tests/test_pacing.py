"""Bursts of text shown smoothly: in virtual time, on a screen that notes when each piece came."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from queue import Empty
from typing import Any

import pytest

from riverinfer import Engine, Output, SamplingParams
from riverinfer.cli import chat, generate, main, terminal
from riverinfer.cli.depth_colors import color
from riverinfer.cli.pacing import Pacer
from riverinfer.outputs import Step

PATIENCE = 20  # seconds of real time until a test that hangs fails


class VirtualTime:
    """A clock that only ``until`` moves, and the writer's queue, which waits by it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._items: deque[Any] = deque()
        self._wakes: float | None = None  # when the writer that waits goes on by itself
        self._changed = threading.Condition()

    def clock(self) -> float:
        return self.now

    def put(self, item: Any) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Any:
        with self._changed:
            end = math.inf if timeout is None else self.now + timeout
            while not self._items and self.now < end:
                self._wakes = end
                self._changed.notify_all()
                assert self._changed.wait(PATIENCE)
            self._wakes = None
            if self._items:
                return self._items.popleft()
        raise Empty

    def until(self, when: float, writer: bool) -> None:
        """Let time pass; with a ``writer``, everything that it does until then is done."""
        with self._changed:
            while writer:
                assert self._changed.wait_for(lambda: self._wakes is not None and not self._items, PATIENCE)
                assert self._wakes is not None
                if self._wakes > when:
                    break
                self.now, self._wakes = self._wakes + 1e-9, None
                self._changed.notify_all()
            self.now = max(self.now, when)


class Screen:
    """A pacer and what it has shown: (time, text)."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self.time = VirtualTime()
        self.shown: list[tuple[float, str]] = []
        self.pacer = Pacer(write or self._note, clock=self.time.clock, queue=self.time)  # type: ignore[arg-type]

    def _note(self, text: str) -> None:
        self.shown.append((round(self.time.now, 6), text))

    @property
    def threaded(self) -> bool:
        return self.pacer._thread is not None

    def at(self, when: float, *pieces: str) -> None:
        """Push pieces one after the other, at a time."""
        self.time.until(when, self.threaded)
        for piece in pieces:
            self.pacer.push(piece)
        self.time.until(when, self.threaded)

    def until(self, when: float) -> list[tuple[float, str]]:
        """What is shown from now until then."""
        before = len(self.shown)
        self.time.until(when, self.threaded)
        return self.shown[before:]

    def finish(self) -> str:
        """What is shown only now."""
        before = len(self.shown)
        self.pacer.finish()
        assert pacers() == []
        return "".join(text for _, text in self.shown[before:])


def pacers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pacer"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert pacers() == []


# --- when -------------------------------------------------------------------------------------------------------


def test_a_burst_is_spread_over_a_round() -> None:
    screen = Screen()
    screen.at(0, "a")
    screen.at(4, "b", "c", "d", "e")
    assert screen.until(7.99) == [(5.0, "c"), (6.0, "d"), (7.0, "e")]
    screen.at(8, "f", "g")
    assert screen.shown == [(0.0, "a"), (4.0, "b"), (5.0, "c"), (6.0, "d"), (7.0, "e"), (8.0, "f")]
    assert screen.until(20) == [(10.0, "g")]
    assert screen.finish() == ""


def test_short_bursts_are_spread_too() -> None:
    screen = Screen()
    for number in range(4):
        screen.at(number * 0.12, "a", "b")
    screen.until(1)
    assert screen.shown[2:] == [(0.12, "a"), (0.18, "b"), (0.24, "a"), (0.3, "b"), (0.36, "a"), (0.42, "b")]
    screen.finish()


def test_pieces_that_trickle_in_share_what_is_left_of_the_round() -> None:
    screen = Screen()
    screen.at(0, "a")
    screen.at(1, "b")
    screen.at(1.04, "c")
    screen.at(1.08, "d")
    shown = screen.until(2)
    assert shown == [(pytest.approx(1 + 1 / 3), "c"), (pytest.approx(1 + 2 / 3), "d")]
    screen.finish()


def test_the_next_burst_is_never_held_up_by_the_one_before() -> None:
    screen = Screen()
    screen.at(0, "a")
    screen.at(10, *"bcdefghijk")
    screen.at(11.5, "l", "m")  # sooner than expected
    assert "".join(text for _, text in screen.shown) == "abcdefghijkl"
    assert [when for when, _ in screen.shown[:3]] == [0.0, 10.0, 11.0]
    assert screen.shown[-1] == (11.5, "defghijkl")
    screen.finish()


def test_what_a_round_takes_is_the_middle_of_the_last_three() -> None:
    screen = Screen()
    for when in (0, 1, 2, 12):
        screen.at(when, "x")
    screen.at(12, "y")  # rounds of 1, 1 and 10 seconds
    assert screen.until(100) == [(12.5, "y")]
    screen.at(100, "z", "z")  # of 1, 10 and 88
    assert screen.until(200) == [(105.0, "z")]
    screen.finish()


@pytest.mark.parametrize("apart", [0.01, 0.04, 0.06, 0.09])
def test_what_comes_fast_is_shown_as_it_comes_and_takes_no_thread(apart: float) -> None:
    """Single pieces, and rounds too short to be noticed."""
    screen = Screen()
    for number in range(100):
        screen.at(number * apart, "a", "b")
    assert not screen.threaded
    assert [text for _, text in screen.shown] == ["a", "b"] * 100
    assert [when for when, _ in screen.shown[::2]] == [pytest.approx(number * apart) for number in range(100)]
    assert [when for when, _ in screen.shown[1::2]] == [when for when, _ in screen.shown[::2]]
    assert screen.finish() == ""


def test_single_pieces_are_not_delayed_however_slowly_they_come() -> None:
    screen = Screen()
    for number in range(10):
        screen.at(number * 3, "a")
    assert [when for when, _ in screen.shown] == [number * 3.0 for number in range(10)]
    assert not screen.threaded
    screen.finish()


def test_rounds_that_become_short_are_no_longer_spread() -> None:
    screen = Screen()
    for when in (0, 1, 2):
        screen.at(when, "a", "b")
    assert screen.threaded
    for number in range(1, 20):
        screen.at(2 + number * 0.07, "a", "b")
    screen.until(3.5)
    assert [when for when, _ in screen.shown[-2:]] == [pytest.approx(3.33)] * 2
    screen.finish()


# --- all of it, and in order --------------------------------------------------------------------------------------


def test_at_the_end_all_is_shown_at_once_in_order_and_unchanged() -> None:
    screen = Screen()
    pieces = [color(letter, depth, 30) for depth, letter in enumerate("bcdefghijk")]
    screen.at(0, "a")
    screen.at(5, *pieces)
    screen.until(6.1)
    assert [text for _, text in screen.shown] == ["a", *pieces[:3]]
    assert screen.finish() == "".join(pieces[3:])
    assert screen.time.now == 6.1  # without waiting
    assert screen.finish() == ""


def test_nothing_is_lost_however_the_pieces_come() -> None:
    """The thread runs freely, and time leaps whenever either looks at the clock: bursts fall over each other."""
    for trial in range(30):
        shown: list[str] = []
        looks = count()
        pacer = Pacer(shown.append, clock=lambda looks=looks: 0.2 * (next(looks) // 3))  # type: ignore[misc]
        said = [f"{trial}.{number} " for number in range(40)]
        for piece in said:
            pacer.push(piece)
        pacer.finish()
        assert "".join(shown) == "".join(said)


def test_an_empty_piece_is_no_piece() -> None:
    screen = Screen()
    screen.at(0, "a", "")
    screen.at(1, "")
    screen.at(2, "b", "", "c")
    assert screen.until(10) == [(3.0, "c")]
    assert "" not in [text for _, text in screen.shown]
    screen.finish()


def test_the_caller_does_not_wait_for_a_screen_that_hangs() -> None:
    going, shown = threading.Event(), list[str]()

    def slow(text: str) -> None:
        if threading.current_thread().name == "pacer":
            assert going.wait(PATIENCE)
        shown.append(text)

    screen = Screen(slow)
    screen.time.now = 0.0
    screen.pacer.push("a")
    for second in range(1, 50):
        screen.time.now = float(second)
        screen.pacer.push("b")
        screen.pacer.push("c")
    assert len(shown) <= 2
    going.set()
    screen.pacer.finish()
    assert "".join(shown) == "a" + "bc" * 49


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), OSError(5, "Input/output error"), ValueError("closed")])
def test_what_the_screen_raises_reaches_the_caller(error: Exception) -> None:
    def broken(text: str) -> None:
        if "c" in text:
            raise error

    screen = Screen(broken)
    screen.at(0, "a")
    screen.at(4, "b", "c", "d")
    with pytest.raises(type(error)) as caught:
        screen.pacer.finish()
    assert caught.value is error
    screen.pacer.finish()  # once

    screen = Screen(broken)
    screen.at(0, "a")
    screen.at(4, "b", "d")
    thread = screen.pacer._thread
    assert thread is not None
    screen.time.now = 8.0
    screen.pacer.push("c")
    thread.join(PATIENCE)
    with pytest.raises(type(error)):
        screen.pacer.push("e")
    screen.pacer.finish()

    screen = Screen(broken)
    with pytest.raises(type(error)):
        screen.pacer.push("c")  # without a thread


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Also where the tests run in a shell's background, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_end_can_be_ended_again() -> None:
    """Ctrl-C while the screen hangs: nothing is lost, and nothing comes after the end."""
    shown, go_on, hangs = list[str](), threading.Event(), threading.Event()
    now = [0.0]

    def write(text: str) -> None:
        if threading.current_thread().name == "pacer":
            hangs.set()
            assert go_on.wait(PATIENCE)
        shown.append(text)

    pacer = Pacer(write, clock=lambda: now[0])
    for at, texts in ((0.0, "a"), (4.0, "bcd")):
        now[0] = at
        for text in texts:
            pacer.push(text)

    now[0] = 9.0
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pacer.finish()
    assert hangs.is_set()
    assert "".join(shown) == "ab"
    go_on.set()
    pacer.finish()
    assert "".join(shown) == "abcd"


# --- where ------------------------------------------------------------------------------------------------------


@pytest.fixture
def screens(monkeypatch: pytest.MonkeyPatch) -> list[Screen]:
    """The pacers that the commands make, in virtual time; they write where they are told to."""
    made: list[Screen] = []

    def make(write: Callable[[str], None]) -> Pacer:
        screen = Screen()
        screen.pacer._write = lambda text: (screen._note(text), write(text))[1]
        made.append(screen)
        return screen.pacer

    for module in (terminal, generate):
        monkeypatch.setattr(module, "Pacer", make)
    return made


@pytest.fixture
def editor(screens: list[Screen], capsys: pytest.CaptureFixture[str]) -> terminal.EditorTerminal:
    """A terminal that shows "ab", with "cd" to come."""
    made = terminal.EditorTerminal(dim=False, history=False)
    made.write("a")
    screens[0].time.now = 4.0
    for piece in "bcd":
        made.write(piece)
    assert capsys.readouterr().out == "ab"
    return made


def test_a_note_waits_for_the_answer(
    editor: terminal.EditorTerminal, screens: list[Screen], capsys: pytest.CaptureFixture[str]
) -> None:
    assert screens[0].until(5.5) == [(pytest.approx(4 + 4 / 3), "c")]
    assert capsys.readouterr().out == "c"
    editor.note("stopped")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("d\n", "stopped\n")
    editor.write("e")
    editor.end_answer()
    assert capsys.readouterr().out == "e\n"
    assert len(screens) == 2  # an answer each


def test_the_end_of_an_answer_shows_all_of_it(
    editor: terminal.EditorTerminal, capsys: pytest.CaptureFixture[str]
) -> None:
    editor.end_answer()
    assert capsys.readouterr().out == "cd\n"
    assert pacers() == []


def test_a_broken_terminal_is_the_chats_to_hear_of(editor: terminal.EditorTerminal, screens: list[Screen]) -> None:
    def broken(text: str) -> None:
        raise BrokenPipeError

    screens[0].pacer._write = broken
    with pytest.raises(BrokenPipeError):
        editor.end_answer()
    editor.end_answer()


class Session:
    """A chat of which each answer is a round of eight tokens, and another that is interrupted."""

    def __init__(self, screens: list[Screen], *, unseen: str = "") -> None:
        self.last_output: Output | None = None
        self.messages: list[dict[str, str]] = []
        self._screens, self._unseen = screens, unseen

    def send(self, text: str, params: SamplingParams) -> Iterator[Step]:
        output = Output()
        try:
            for when, pieces in ((0.0, "a"), (4.0, "bcdefgh")):
                if self._screens:
                    self._screens[-1].time.now = when
                for piece in pieces:
                    step = Step(piece, 7, 0.0)
                    output.add(step)
                    yield step
            self._screens[-1].until(5.0)
            if self._unseen:
                output.add(Step(self._unseen, 7, 0.0))
            raise KeyboardInterrupt
        finally:
            self.last_output = output
            self.messages.append({"role": "assistant", "content": output.text})


@pytest.mark.parametrize("unseen", ["", "!"])
def test_what_was_said_before_ctrl_c_is_shown_and_kept(
    unseen: str, screens: list[Screen], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a token that was kept but not handed out any more."""
    session, screen = Session(screens, unseen=unseen), terminal.EditorTerminal(dim=False, history=False)
    params = SamplingParams()
    chat._Chat(screen, session, params, stats=False, debug=True).message("Hi")  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.out == session.messages[0]["content"] + "\n" == f"abcdefgh{unseen}\n"
    assert captured.err == "stopped\n"
    assert screens[0].shown[1] == (4.0, "b")
    assert [when for when, _ in screens[0].shown[2:]] == [pytest.approx(4 + 4 / 7), 5.0]  # the rest at once


MODEL_FLAGS = ["-p", "Hi", "-n", "6", "--ignore-eos", "--device", "cpu", "--dtype", "float32"]
MODEL_FLAGS += ["--generation-config", "none"]


def test_generate_paces_on_a_terminal_only(
    llama: Engine, screens: list[Screen], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(llama.model_dir)
    assert main(["generate", model, *MODEL_FLAGS]) == 0
    plain = capsys.readouterr().out
    assert main(["generate", model, *MODEL_FLAGS, "--json"]) == 0
    capsys.readouterr()
    assert screens == []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["generate", model, *MODEL_FLAGS, "--json"]) == 0
    capsys.readouterr()
    assert screens == []
    assert main(["generate", model, *MODEL_FLAGS]) == 0
    assert capsys.readouterr().out == plain
    assert len(screens) == 1
    assert "".join(text for _, text in screens[0].shown) + "\n" == plain


def test_generate_shows_all_before_it_is_interrupted(
    llama: Engine, screens: list[Screen], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(screens)
    session.template = "one"  # type: ignore[attr-defined]
    session.send = lambda text, params, output: Session.send(session, text, params)  # type: ignore[method-assign,assignment,misc]
    monkeypatch.setattr(generate, "make_session", lambda *_, **__: session)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["generate", str(llama.model_dir), *MODEL_FLAGS]) == 130
    assert capsys.readouterr().out == "abcdefgh"


def test_a_pipe_gets_each_piece_at_once(capsys: pytest.CaptureFixture[str], screens: list[Screen]) -> None:
    pipe = terminal.PipeTerminal()
    for piece in "abc":
        pipe.write(piece)
        assert capsys.readouterr().out == piece
    pipe.end_answer()
    assert screens == []
