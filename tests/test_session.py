"""Chats: what is computed again and what is not, stopping early, undo, regenerate, save and load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden_models import NAMES, ROOT, Golden, copy_model, edit_json

from riverinfer import ChatSession, Engine, SamplingParams
from riverinfer.errors import (
    ChatTemplateError,
    ContextLengthError,
    InvalidRequestError,
    RiverinferWarning,
    SessionFileError,
)

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture
def chat(llama: Engine) -> Iterator[ChatSession]:
    session = llama.session(system="Be brief.")
    yield session
    session.close()


def say(session: ChatSession, text: str, params: SamplingParams = SHORT) -> str:
    return "".join(step.text for step in session.send(text, params))


def whole_characters(session: ChatSession) -> SamplingParams:
    """Sampling under which the answer to "Hello" has whole characters, which a random model's bytes seldom are, and
    no space for the template to trim."""
    for seed in range(1000):
        params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=seed)
        steps = list(session.send("Hello", params))
        session.undo()
        said = "".join(step.text for step in steps[:5])
        if all(step.text for step in steps) and said.isprintable() and said == said.strip() and "\ufffd" not in said:
            session.close()
            return params
    raise AssertionError("no such seed")


@pytest.mark.parametrize("name", NAMES)
def test_rendered_text_and_ids_are_the_golden_ones(name: str, goldens: dict[str, Golden]) -> None:
    with Engine.load(ROOT / name, device="cpu", ctx_size=256, max_sequences=1) as engine:
        for case in goldens[name].info["chat"]:
            session = engine.session(messages=case["messages"])
            assert session.prompt_text() == case["text"]
            assert session._encode(case["text"]) == case["ids"]


def test_messages_grow_and_answers_are_kept(chat: ChatSession) -> None:
    first = say(chat, "Hello")
    second = say(chat, "And then?")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in chat.messages] == ["Be brief.", "Hello", first, "And then?", second]


def test_a_turn_computes_only_what_is_new(chat: ChatSession) -> None:
    say(chat, "Hello")
    first = chat.last_output
    assert first is not None
    assert first.stats.cached_tokens == 0
    say(chat, "And then?")
    second = chat.last_output
    assert second is not None
    # Everything but the last sampled token, which was never passed through the model.
    assert second.stats.cached_tokens == first.stats.prompt_tokens + first.stats.new_tokens - 1
    assert second.prompt_token_ids[: second.stats.cached_tokens] == (first.prompt_token_ids + first.token_ids)[:-1]


def test_cached_turns_say_what_a_fresh_session_says(llama: Engine, chat: ChatSession) -> None:
    for text in ("Hello", "More", "Once again"):
        say(chat, text)
        ids = chat.last_output.prompt_token_ids  # type: ignore[union-attr]
        assert llama.generate(ids, SHORT).token_ids == chat.last_output.token_ids  # type: ignore[union-attr]


def test_a_session_that_lost_its_slot_computes_again_and_says_the_same(llama: Engine) -> None:
    calm, disturbed = llama.session(), llama.session()
    want = [say(calm, "Hello"), say(calm, "More")]
    calm.close()
    got = [say(disturbed, "Hello")]
    streams = [llama.stream("x", SHORT), llama.stream("y", SHORT)]
    for stream in streams:
        next(stream)
    assert disturbed.cached_tokens() == 0
    del stream, streams
    got.append(say(disturbed, "More"))
    assert got == want
    assert disturbed.last_output is not None
    assert disturbed.last_output.stats.cached_tokens == 0


def test_stopping_early_keeps_the_text_and_the_cache(chat: ChatSession, llama: Engine) -> None:
    params = whole_characters(chat)
    said = ""
    for count, step in enumerate(chat.send("Hello", params), 1):
        said += step.text
        if count == 5:
            break
    assert llama.slots.busy == 0
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    cached = chat.cached_tokens()
    say(chat, "Go on")
    assert chat.last_output is not None
    assert chat.last_output.stats.cached_tokens == cached


def test_an_interrupt_inside_the_model_keeps_the_text_too(chat: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    extend = chat.engine.extend

    def interrupted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return extend(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(chat.engine, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "Hello")
    monkeypatch.undo()
    assert chat.messages[-1]["role"] == "assistant"
    assert calls == 6
    assert len(chat.last_output.token_ids) == 5  # type: ignore[union-attr]
    assert say(chat, "Go on")


def test_a_new_turn_closes_an_abandoned_one(chat: ChatSession) -> None:
    left_over = chat.send("Hello", SHORT)
    next(left_over)
    say(chat, "Something else")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert list(left_over) == []


def test_undo_clear_and_regenerate(chat: ChatSession) -> None:
    first = say(chat, "Hello")
    say(chat, "More")
    assert chat.undo() == "More"
    assert chat.messages[-1]["content"] == first
    again = "".join(step.text for step in chat.regenerate(SHORT))
    assert again == first
    assert len(chat.messages) == 3
    assert chat.last_output is not None
    assert chat.last_output.stats.cached_tokens == chat.last_output.stats.prompt_tokens - 1
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.undo() is None
    with pytest.raises(InvalidRequestError, match="no message to answer again"):
        chat.regenerate()


def test_the_system_prompt_can_be_changed(chat: ChatSession) -> None:
    say(chat, "Hello")
    chat.system = "Be loud."
    assert "Be loud." in chat.prompt_text()
    chat.system = None
    assert chat.system is None
    assert chat.messages[0]["role"] == "user"


def test_a_message_too_long_leaves_the_conversation_as_it_was(chat: ChatSession) -> None:
    say(chat, "Hello")
    before = list(chat.messages)
    with pytest.raises(ContextLengthError, match="context 256"):
        chat.send("word " * 400)
    assert chat.messages == before
    assert say(chat, "Still there?")


def test_a_context_that_fills_during_an_answer_keeps_the_answer(chat: ChatSession) -> None:
    with pytest.raises(ContextLengthError, match="is full"):
        say(chat, "Hello", SamplingParams(ignore_eos=True))
    assert chat.last_output is not None
    assert chat.messages[-1] == {"role": "assistant", "content": chat.last_output.text}
    assert len(chat.last_output.prompt_token_ids) + len(chat.last_output.token_ids) == 257
    with pytest.raises(ContextLengthError):
        chat.send("More")
    chat.clear()
    assert say(chat, "Hello")


def test_answers_cut_by_a_stop_string_are_encoded_again(chat: ChatSession) -> None:
    whole = say(chat, "Hello")
    chat.clear()
    stop = whole[3:6]
    said = say(chat, "Hello", SamplingParams(max_tokens=12, ignore_eos=True, stop=(stop,)))
    assert stop not in said
    say(chat, "More")
    assert chat.last_output is not None
    text = chat.engine.tokenizer.decode(chat.last_output.prompt_token_ids)
    assert f"{said}<|im_end|>" in text


def test_save_and_load_round_trip(llama: Engine, chat: ChatSession) -> None:
    say(chat, "Hello")
    other = llama.session()
    other.load_dict(chat.to_dict())
    assert other.messages == chat.messages
    before = list(other.messages)
    for bad in (
        None,
        [],
        {},
        {"version": 99},
        {"version": 1, "messages": 5},
        {"version": 1, "messages": [{"role": "x"}]},
    ):
        with pytest.raises(SessionFileError):
            other.load_dict(bad)
    assert other.messages == before


def test_bare_text_without_a_template(llama: Engine) -> None:
    session = llama.session(use_template=False)
    say(session, "Hello")
    assert session.last_output is not None
    assert session.last_output.prompt_token_ids == llama.tokenizer.encode("Hello")


def test_templates_given_or_missing(llama: Engine) -> None:
    session = llama.session(chat_template="{{ messages[-1].content }}{{ mark }}", template_kwargs={"mark": "!"})
    assert session.prompt_text([{"role": "user", "content": "Hi"}]) == "Hi!"
    with pytest.raises(ChatTemplateError):
        llama.session(chat_template="{% for %}")
    broken = llama.session(chat_template="{{ raise_exception('no tools here') }}")
    with pytest.raises(ChatTemplateError, match="no tools here"):
        broken.send("Hi")
    assert broken.messages == []


def test_bad_messages_are_refused(llama: Engine, chat: ChatSession) -> None:
    with pytest.raises(InvalidRequestError, match="message is empty"):
        chat.send("")
    for bad in ({"role": "narrator", "content": "x"}, {"role": "user"}, {"role": "user", "content": 5}):
        with pytest.raises(InvalidRequestError, match="malformed"):
            llama.session(messages=[bad])  # type: ignore[list-item]


def test_changes_during_an_answer_win_over_it(chat: ChatSession) -> None:
    saved = {"version": 1, "messages": [{"role": "user", "content": "saved"}]}

    def begin() -> Iterator[object]:
        chat.clear()
        stream = chat.send("Hello", SHORT)
        next(stream)
        return stream

    for change in (lambda: chat.clear(), lambda: chat.load_dict(saved), lambda: chat.set_messages([])):
        stream = begin()
        change()
        expected = list(chat.messages)
        assert list(stream) == []
        assert chat.messages == expected
        assert all(message["content"] != "Hello" for message in chat.messages)


def test_a_session_answers_one_thread_at_a_time(chat: ChatSession) -> None:
    mine = chat.send("Hello", SHORT)
    caught: list[BaseException] = []

    def other() -> None:
        try:
            chat.send("Mine!", SHORT)
        except InvalidRequestError as exc:
            caught.append(exc)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(10)
    assert "answering another thread" in str(caught[0])
    assert len(list(mine)) == 12


def test_an_empty_system_prompt_is_not_none(llama: Engine) -> None:
    session = llama.session(system="")
    assert session.messages == [{"role": "system", "content": ""}]
    assert llama.session().messages == []


def test_tokens_that_no_message_shows_are_not_kept_for_later_turns(llama: Engine) -> None:
    """Under ignore_eos the model may go on after a special token; the next turn sees what the messages say."""
    special = llama.tokenizer.eos_token_id
    assert special is not None
    session = llama.session()
    for _ in session.send("Hello", SamplingParams(max_tokens=3, ignore_eos=True)):
        pass
    output = session.last_output
    assert output is not None
    output.token_ids.insert(1, special)
    session._marks.clear()
    session._remember(session.prompt_text(session.messages[:1]), output.prompt_token_ids, output)
    assert session._marks == [(len(session._text), len(session._ids))]
    assert special not in session._ids[len(output.prompt_token_ids) :]


def test_named_templates_can_be_chosen(tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "model")
    named = [{"name": "a", "template": "A{{ messages[0].content }}"}, {"name": "b", "template": "B"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    with Engine.load(folder, device="cpu", ctx_size=64, max_sequences=1) as engine:
        with pytest.raises(ChatTemplateError, match="choose one of 'a', 'b'"):
            engine.session()
        assert engine.session(template_name="a").prompt_text([{"role": "user", "content": "x"}]) == "Ax"


def test_two_bos_tokens_are_warned_about(llama: Engine) -> None:
    session = llama.session(chat_template="{{ bos_token }}{{ bos_token }}{{ messages[0].content }}")
    with pytest.warns(RiverinferWarning, match="two BOS"):
        session.send("x")
