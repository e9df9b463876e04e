"""Chat templates are rendered as transformers renders them, and a hostile one does no harm."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from weighbridge.errors import ConfigurationError
from weighbridge.lab.variants import VARIANTS
from weighbridge.records import Message
from weighbridge.reference.templates import render_conversations

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [Message(role="user", content="  {{ 7 * 7 }} {% raw %} <b>é</b> \u2028\n")]
LONG = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="One?"),
    Message(role="assistant", content="One."),
    Message(role="user", content="Two?"),
]

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
CHATML = """{% set ns = namespace(turns=0) %}
{% macro head(role) %}<|im_start|>{{ role }}
{% endmacro %}
    {% for message in messages %}
        {% if loop.index0 > 2 %}{% break %}{% endif %}
        {% if not message.content %}{% continue %}{% endif %}
        {% set ns.turns = ns.turns + 1 %}
{{ head(message.role) }}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

    {% endfor %}
{# a comment #}
{{ ns.turns }}{{ pad_token }}{{ dict(a=1) }}{{ documents }}
{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}
"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
TOJSON = "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=True, ensure_ascii=True) }}"
REAL = {"llama-3": LLAMA3, "chatml": CHATML, "gemma": GEMMA, "tojson": TOJSON}
REAL |= {name: variant.template for name, variant in VARIANTS.items() if variant.template is not None}


@pytest.fixture(autouse=True)
def no_child_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    children: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            children.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


def render(template: str, *conversations: list[Message], **options: Any) -> list[str]:
    return render_conversations(template, conversations or [USER], special_tokens=TOKENS, name="example", **options)


def refusal(template: str, *conversations: list[Message], **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        render(template, *conversations, **options)
    said = str(caught.value)
    assert "example" in said
    assert said.isprintable()
    return said


def test_what_people_say_is_data() -> None:
    assert render("{{ messages[0].content }}", USER, LONG) == [USER[0].content, "Be brief."]


def test_the_date_is_the_callers() -> None:
    (text,) = render(LLAMA3, date="2024-07-04")
    assert "Today Date: 04 Jul 2024\n" in text
    assert "asks for today's date. Name the date" in refusal(LLAMA3)
    with pytest.raises(ConfigurationError, match="'soon' is no date"):
        render(LLAMA3, date="soon")


def test_a_template_speaks_for_itself_in_one_short_line() -> None:
    assert "refuses conversation 2: System role not supported. " in refusal(GEMMA, USER, LONG)
    said = refusal("{{ raise_exception('bad\n\x1b[31m\u202e' + 'z' * 10000) }}")
    assert "bad [31m zzz" in said
    assert len(said) < 400


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("", "there is no chat template"),
        ("\n{% for m in messages %}", "line 2"),
        ("{{ messages | nothing }}", "line 1: No filter named 'nothing'"),
        ("{{ messages[9].content }}", "uses what is not there"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ 'x' * 17000000 }}", "writes more than 16 MiB"),
        ("{{ ''.__class__.__mro__ }}", "Python's internals"),
        ("{{ messages.__init__.__globals__ }}", "Python's internals"),
        ("{{ cycler.__init__.__globals__ }}", "Python's internals"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "Python's internals"),
        ("{{ namespace(__class__=1) }}", "Python's internals"),
        ("{{ messages.append(1) }}", "Python's internals"),
        ("{{ lipsum.__globals__ }}", "'lipsum' is undefined"),
        ("{{ messages | random }}", "No filter named 'random'"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
        ("{% import 'os' as os %}{{ os.environ }}", "cannot be rendered"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**10 }}", "MiB of memory"),
        (
            "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "MiB of memory",
        ),
    ],
    ids=lambda value: value[:40],
)
def test_a_template_that_cannot_be_used(template: str, expected: str) -> None:
    assert expected in refusal(template)


@pytest.mark.parametrize(
    "template",
    ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 9 ** (9 ** 9) }}"],
)
def test_a_template_without_an_end(template: str) -> None:
    began = time.monotonic()
    assert "was not rendered within 1.5 s" in refusal(template, limit_s=1.5)
    assert time.monotonic() - began < 10


def test_a_process_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert "without an answer, exit status 1" in refusal("{{ 1 }}")


def test_text_up_to_the_limit_arrives() -> None:
    (text,) = render(
        "{% for i in range(160) %}{{ messages[0].content * 100000 }}{% endfor %}",
        [Message(role="user", content="\x01")],
    )
    assert text == "\x01" * 16_000_000


def test_the_process_is_light_and_has_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_API_KEY", "secret")
    seen: list[dict[str, Any]] = []
    run = subprocess.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", watched)
    render("{{ 1 }}")
    assert "EXAMPLE_API_KEY" not in seen[0]["env"]
    code = "import json, sys, weighbridge.reference.templates; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(run([sys.executable, "-I", "-c", code], capture_output=True, check=True).stdout)
    assert not {"numpy", "pydantic", "httpx2", "weighbridge.records"} & set(loaded)
