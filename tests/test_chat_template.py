"""Chat templates: where they are found, what they print (transformers is the oracle), how bad ones fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from riverinfer import template_sandbox
from riverinfer.chat_template import ChatTemplate, choose_template, load_templates
from riverinfer.errors import ChatTemplateError
from riverinfer.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
REASONING = ("reasoning_content", "thinking", "reasoning")
NAMES = sorted(path.name for path in GOLDEN.iterdir() if (path / "golden.json").is_file())
CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hé <b>&\n'\"日本"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"},
    {"role": "user", "content": "And 12?"},
]
TOOLS = [{"type": "function", "function": {"name": "é<&>", "parameters": {"b": 1, "a": [None, True, 1.5]}}}]


def render(source: str, messages=CHAT, tokens=None, **options) -> str:
    return ChatTemplate(source, special_tokens=tokens or {}, origin="chat_template.jinja").render(messages, **options)


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    golden = json.loads((GOLDEN / name / "golden.json").read_text("utf-8"))
    tokenizer = Tokenizer.load(GOLDEN / name)
    chosen, source = choose_template(load_templates(GOLDEN / name))
    assert chosen == "default"
    template = ChatTemplate(source, special_tokens=tokenizer.special_tokens_map, origin=name)
    for chat in golden["chat"]:
        text = template.render(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
        assert text == chat["text"]
        assert tokenizer.encode(text, add_special_tokens=False) == chat["ids"]


AWKWARD = {
    "generation tag": "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% set x = 1 %}"
    "{{ loop.index }}{% endgeneration %}[{{ x }}]\n{% endfor %}",
    "generation writes a namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}"
    "{% set ns.n = ns.n + 1 %}{% endgeneration %}{% endfor %}{{ ns.n }}",
    "break and continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "loop variables": "{% for m in messages %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.length }}{{ loop.last }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if loop.nextitem is defined }}"
    "{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{{ loop.depth }}{% else %}none{% endfor %}",
    "filtered loop": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ loop.length }}{% endfor %}"
    "{% for m in messages|selectattr('role', 'equalto', 'user') %}{{ loop.length }}{% endfor %}",
    "recursive loop": "{% for x in [[1, [2]], []] recursive %}{{ loop.depth }}{% if x is iterable %}"
    "{{ loop(x) }}{% else %}{{ x }}{% endif %}{% endfor %}",
    "empty and undefined loops": "{% for x in [] %}{% else %}e{% endfor %}{% for x in nothing %}{% else %}u"
    "{% endfor %}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% for c in 'ab' %}{{ c }}.{% endfor %}",
    "namespace": "{% set ns = namespace(found=false, self=1) %}{% for m in messages %}{% set ns.found = true %}"
    "{% endfor %}{{ ns.found }}{{ ns.self }}",
    "tojson": "{{ messages|tojson }}{{ tools|tojson(indent=2) }}{{ {'b': 1, 'a': 'é<&>'}|tojson(sort_keys=true) }}"
    "{{ 'é'|tojson(ensure_ascii=true) }}{{ [1, 2]|tojson(separators=(',', ':')) }}",
    "tools": "{% if tools %}{% for t in tools %}{{ t.function.name }}{{ t['function']['parameters'] }}{% endfor %}"
    "{% endif %}{{ tools is none }}{{ documents is none }}",
    "missing variables": "[{{ nothing }}]{{ nothing is defined }}{{ nothing or 'x' }}{{ nothing|default('d') }}"
    "{{ messages[0].nothing }}{{ bos_token }}",
    "whitespace": "{% if true %}\n  {% if true %}\n    x\n  {% endif %}\n{% endif %}\n\n{#- c -#}\n  {{- 'y' }} \n",
    "operators": "{{ 7 // 2 }}{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ [1] * 2 + [2] }}{{ 7 % 4 }}{{ '%s-%05d' % ('a', 3) }}"
    "{{ 1 ~ 'a' ~ none ~ [1] }}{{ 1 < 2 < 3 }}{{ (1, 2) == (1, 2) }}{{ messages[0] == messages[1] }}{{ 3 / 2 - 1 }}"
    "{{ 'a' in 'abc' }}{{ messages[0].role not in ['user', 'x'] }}{{ 1 is eq(1) }}{{ -1 ** 2 }}",
    "methods": "{{ ' a '.strip() }}{{ 'a,b'.split(',')[-1] }}{{ 'abc'[::-1] }}{{ 'x'.join(['a', 'b']) }}"
    "{{ 'a'.upper().center(5) }}{{ '{} {:>4}'.format('a', 1) }}{{ 'aXb'.replace('X', '--') }}{{ {'a': 1}.get('b') }}"
    "{{ messages[1:][0].content.startswith('H') }}{{ [3, 1].index(1) }}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }}{{ ['b', 'a']|sort|first }}{{ [1, 2]|sum }}"
    "{{ ' a '|trim|upper }}{{ 'a\nb'|indent(2) }}{{ 'a'|center(5) }}{{ [1, 2, 3]|batch(2)|list }}{{ 2.567|round(1) }}"
    "{{ messages|length }}{{ {'b': 1, 'a': 2}|dictsort }}{{ {'a': 1}|items|list }}{{ [1, 1]|unique|list }}"
    "{{ messages|groupby('role')|map('first')|list }}{{ '%s!'|format('a') }}{{ 'a b'|replace(' ', '_') }}"
    "{{ [[1], [2]]|sum(start=[]) }}{{ 'x'|default('y', true) }}{{ '12'|int + 1 }}{{ [1, none]|select|list }}"
    "{{ messages|rejectattr('role', 'in', ['user'])|list|length }}{{ [3, 1]|max }}{{ '<a>'|e }}{{ 'x'|string }}",
    "macros": "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{{ f(1, b=3) }}"
    "{% call f(0) %}c{% endcall %}{% filter upper %}abc{% endfilter %}{% set x %}b{{ 1 }}{% endset %}{{ x }}"
    "{% with y = 5 %}{{ y }}{% endwith %}",
    "dict and globals": "{{ dict(a=1) }}{{ dict.fromkeys(['a'], 0) }}{{ range(3)|list }}"
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner('|') %}{{ j() }}{{ j() }}",
    "arguments": "{{ add_generation_prompt }}{{ enable_thinking }}{{ bos_token }}{{ eos_token is defined }}",
    "autoescape": "{% autoescape true %}{{ '<' }}{{ '<' ~ '>' }}{% endautoescape %}{{ '<' }}",
    "conditional constants": "{% if 'a' ~ 1 == 'a1' and 2 + 2 == 4 %}ok{% elif x %}{% else %}no{% endif %}",
}


@pytest.mark.parametrize("source", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("prompt", [False, True])
def test_same_as_transformers(source: str, prompt: bool) -> None:
    # How reasoning is named differs between releases of transformers.
    chat = [{key: value for key, value in message.items() if key not in REASONING} for message in CHAT]
    for extra in ({}, {"bos_token": "<s>", "enable_thinking": False}):
        for tools in (None, TOOLS):
            expected, _ = render_jinja_template(
                conversations=[chat], chat_template=source, tools=tools, add_generation_prompt=prompt, **extra
            )
            assert render(source, chat, tools=tools, add_generation_prompt=prompt, **extra) == expected[0]


def test_reasoning_is_there_under_each_name_templates_look_for() -> None:
    """As transformers 5.23 does: under the name given, and as reasoning_content and thinking."""
    source = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}|{{ messages[0].reasoning }}"
    for given, expected in (("reasoning_content", "r|r|"), ("thinking", "r|r|"), ("reasoning", "r|r|r")):
        assert render(source, [{"role": "assistant", "content": "x", given: "r"}]) == expected


@pytest.mark.parametrize("source", AWKWARD.values(), ids=AWKWARD)
def test_rendering_twice_gives_the_same(source: str) -> None:
    template = ChatTemplate(source, special_tokens={}, origin="x")
    assert template.render(CHAT) == template.render(CHAT)


def test_special_tokens_and_arguments() -> None:
    tokens = {"bos_token": "<s>", "additional_special_tokens": ["a", "b"], "pad_token": None}
    source = "{{ bos_token }}{{ additional_special_tokens[1] }}{{ pad_token is defined }}"
    assert render(source, tokens=tokens) == "<s>bFalse"
    assert render(source, tokens=tokens, bos_token="<t>") == "<t>bFalse"


def test_clock() -> None:
    source = "{{ strftime_now('%d %b %Y %H') }}"
    assert render(source, now=datetime(2026, 1, 2, 3)) == "02 Jan 2026 03"
    assert render("{{ strftime_now('%Y') }}") == f"{datetime.now():%Y}"


def test_messages_are_plain_copies_without_none() -> None:
    @dataclasses.dataclass
    class Part:
        text: str

    class Loud(str):
        def secret(self) -> str:
            return "secret"

    messages = [{"role": "user", "content": None, "name": Loud("n"), "parts": [Part("p"), object()]}]
    source = "{{ messages[0].content is defined }}{{ messages[0].parts }}{{ messages[0].name.secret is defined }}"
    assert render(source, messages) == "False[{'text': 'p'}, '<object>']False"
    assert messages[0]["content"] is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "[a][b "),
        ("{% for m in messages %}[{{ m.content|trim }}]{% endfor %}{{ add_generation_prompt }}", "[a][b"),
        ("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "a</s>b "),
    ],
)
def test_continue_final_message(source: str, expected: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    assert render(source, messages, continue_final_message=True) == expected
    assert messages[1]["content"] == "b "


def test_continue_final_message_as_transformers_does() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}</>{% endfor %}"
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "ab"}]}]
    for field in (True, "content"):
        expected, _ = render_jinja_template(conversations=[parts], chat_template=source, continue_final_message=field)
        assert render(source, parts, continue_final_message=field) == expected[0] == "<assistant>ab"


def test_reasoning_can_be_continued() -> None:
    source = "<{{ messages[0].reasoning_content }}</>{{ messages[0].content }}"
    message = {"role": "assistant", "content": "ab", "thinking": "think"}
    for field in ("reasoning_content", "thinking"):
        assert render(source, [message], continue_final_message=field) == "<think"


def test_continue_final_message_errors() -> None:
    with pytest.raises(ChatTemplateError, match="no text in 'content'"):
        render("{{ messages[-1].content }}", [{"role": "assistant"}], continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="does not show the last message's content"):
        render("hello", continue_final_message=True)


# ------------------------------------------------------------------------------ bad templates


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", r"line 1: does not parse"),
        ("\n\n{{ x ", r"line 3: does not parse"),
        ("{% nonsense %}", r"line 1: does not parse.*nonsense"),
        ("{{ x|nonsense }}", r"nonsense"),
        ("{{ " + "(" * 50_000 + " }}", r"does not parse"),
        ("{% if x %}" * 5000, r"does not parse"),
        ("x" * (2 << 20), r"longer than"),
        ("{% generation %}", r"does not parse"),
        ("{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}", r"does not parse"),
    ],
)
def test_does_not_parse(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"^chat_template\.jinja: .*" + message):
        ChatTemplate(source, special_tokens={}, origin="chat_template.jinja").render(CHAT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n{{ raise_exception('roles must alternate: é') }}", r"line 2: .*roles must alternate: é"),
        ("{{ nothing.attribute }}", r"line 1: .*'nothing' is undefined"),
        ("{{ messages[9].content }}", r"not defined"),
        ("{{ messages.append(1) }}", r"not allowed.*append"),
        ("{{ ''.__class__.__mro__ }}", r"not allowed.*__class__"),
        ("{{ [].__len__() }}", r"not allowed"),
        ("{{ dict.__init__ }}{{ dict.mro() }}", r"not (defined|allowed)"),
        ("{{ 1 / 0 }}", r"ZeroDivisionError"),
        ("{{ 1 + 'a' }}", r"TypeError"),
        ("{{ messages[0].content() }}", r"line 1: .*"),
        ("{% include 'x' %}", r"TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"too deeply"),
        ("{{ {1: object}|tojson }}", r"TypeError"),
    ],
)
def test_fails_while_rendering(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"^chat_template\.jinja: .*" + message):
        render(source)


def test_bad_messages() -> None:
    with pytest.raises(ChatTemplateError, match="messages: there are none"):
        render("x", [])
    with pytest.raises(ChatTemplateError, match="should be an object, not str"):
        render("x", ["hello"])
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ChatTemplateError, match="nested too deeply"):
        render("x", [{"role": deep}])


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}{% endset %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "{% for x in range(9) recursive %}{{ loop(range(9)) if loop.depth < 40 }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% macro f() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call f() %}{% for i in range(99999) %}{% endfor %}{% endcall %}",
    "{% generation %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endgeneration %}",
    "{% for i in range(99999) %}{% set x = range(99999)|map('string')|sort|join %}{% endfor %}",
]
DOUBLE = "{% set ns = namespace(s='x', l=[1], n=3) %}{% for i in range(60) %}"
HUGE = [
    "{{ 'x' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'x' }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ (10 ** 10 * (1, 2))|length }}",
    "{{ 10 ** 10 ** 3 ** 10 * 10 ** 1000000 }}",
    "{{ 'x' * (10 ** 4000 * 10 ** 4000) }}",
    DOUBLE + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    DOUBLE + "{% autoescape true %}{% set ns.s = ns.s ~ ns.s %}{% endautoescape %}{% endfor %}",
    DOUBLE + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    DOUBLE + "{% set ns.s = ns.s * 2 %}{% endfor %}",
    DOUBLE + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}" + DOUBLE + "{% set ns.s = f(ns.s) %}{% endfor %}",
    DOUBLE + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    DOUBLE + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set s = 'x' * 1000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "{% set s = 'x' * 1000000 %}{% set t %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}",
]


def assert_refused(source: str, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError, match=r"^chat_template\.jinja: (line 1: )?" + message):
        render(source)
    assert time.perf_counter() - start < 4
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kibibytes < 700 * 1024


@pytest.mark.parametrize("source", ENDLESS)
def test_templates_that_would_not_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "RENDER_SECONDS", 0.1)
    assert_refused(source, r"does not finish: it ran for more than 0\.1 s")


@pytest.mark.parametrize("source", HUGE)
def test_templates_that_repeat_too_much(source: str) -> None:
    assert_refused(source, r"(makes|calculates a number of) more than \d+ (characters|bits)")


def test_range_over_the_limit() -> None:
    assert_refused("{% for i in range(10 ** 9) %}{% endfor %}", "failed: OverflowError: Range too big")


def test_time_limit_in_another_thread() -> None:
    errors = []

    def work() -> None:
        with pytest.raises(ChatTemplateError) as caught:
            render(ENDLESS[0])
        errors.append(str(caught.value))

    start = time.perf_counter()
    thread = threading.Thread(target=work)
    thread.start()
    others = 0
    while thread.is_alive():
        assert render("{% for m in messages %}{{ m.role }} {% endfor %}") == "system user assistant user "
        others += 1
    thread.join()
    assert time.perf_counter() - start < 4
    assert "does not finish" in errors[0]
    assert others > 10


@pytest.mark.parametrize("source", ["x", "{{ raise_exception('no') }}", HUGE[0], ENDLESS[0]])
def test_trace_function_is_put_back(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "RENDER_SECONDS", 0.1)

    def trace(frame: object, event: str, arg: object) -> None:
        return None

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(ChatTemplateError):
            render(source)
        after = sys.gettrace()
    finally:
        sys.settrace(previous)
    assert after is trace


def test_long_conversations_stay_in_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 100}] * 3000
    source = (
        "{% set ns = namespace(l=[], s='') %}{% for m in messages %}{% set ns.l = ns.l + [m] %}"
        "{% set ns.s = ns.s ~ m.content %}{% endfor %}{{ ns.s }}{{ ns.l|length }}"
    )
    assert render(source, messages).endswith("3000")


# ------------------------------------------------------------------------------ finding templates


def config(folder: Path, **content: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(content), "utf-8")


def test_order_of_sources(tmp_path: Path) -> None:
    assert load_templates(tmp_path) == {}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "legacy"}')
    assert load_templates(tmp_path) == {"default": "legacy"}
    config(tmp_path, chat_template="config")
    assert load_templates(tmp_path) == {"default": "config"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools é", "utf-8")
    assert load_templates(tmp_path) == {"default": "config", "tool_use": "tools é"}
    config(tmp_path, chat_template=[{"name": "default", "template": "c"}, {"name": "rag", "template": "r"}])
    assert load_templates(tmp_path) == {"default": "c", "rag": "r", "tool_use": "tools é"}
    (tmp_path / "chat_template.jinja").write_text("file\n")
    assert load_templates(tmp_path) == {"default": "file\n", "tool_use": "tools é"}


def test_choice() -> None:
    both = {"default": "d", "tool_use": "t"}
    assert choose_template(both) == ("default", "d")
    assert choose_template(both, tools=True) == ("tool_use", "t")
    assert choose_template({"default": "d"}, tools=True) == ("default", "d")
    assert choose_template(both, name="tool_use") == ("tool_use", "t")
    assert choose_template({"rag": "r"}) == ("rag", "r")
    with pytest.raises(ChatTemplateError, match=r"no template 'x'; choose one of 'default', 'tool_use'"):
        choose_template(both, name="x")
    with pytest.raises(ChatTemplateError, match=r"choose one of 'rag', 'other'"):
        choose_template({"rag": "r", "other": "o"})
    with pytest.raises(ChatTemplateError, match=r"no chat template; pass"):
        choose_template({})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"chat_template": 7}', '{"chat_template": [{"name": "x"}]}'])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_broken_sources(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ChatTemplateError, match=file):
        load_templates(tmp_path)


def test_template_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ChatTemplateError, match=r"chat_template\.jinja: is not UTF-8"):
        load_templates(tmp_path)
