"""Chat templates, which are programs that come with somebody else's model, rendered in a sandbox under limits.

The texts are those of transformers' ``apply_chat_template``; its environment (5.23) is rebuilt here, because this
must work where transformers is not installed. What it leaves to the clock and to chance is left out, so that a
template gives the same text each time: ``strftime_now`` tells midnight of a date that the caller names, and
``lipsum`` and the filter ``random`` are absent.

The template runs in a process of its own, ``python -I -m weighbridge.reference.templates``: this file again. It is
given none of the environment's variables, so none of the keys.
"""

import contextlib
import datetime
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from weighbridge.errors import ConfigurationError

if TYPE_CHECKING:
    from weighbridge.records import Message

    Tools = list[dict[str, Any]]

LIMIT_S = 20.0
MEMORY_BYTES = 512 * 2**20
TEXT_BYTES = 16 * 2**20
_DETAIL_CHARACTERS = 200

# What the process may not do without; on other systems these names are not set.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "SYSTEMROOT")

_REPLACE = "Take the template that the model's publisher gives"
_PROBLEMS = {
    "syntax": ("has an error in {detail}", _REPLACE),
    "slow": ("was not rendered within {limit:g} s: it may hold a loop without an end", _REPLACE),
    "memory": ("needs more than {memory} MiB of memory", _REPLACE),
    "long": ("writes more than {text} MiB of text", _REPLACE),
    "internals": ("reaches for Python's internals: {detail}", f"Do not trust it. {_REPLACE}"),
    "refused": ("refuses {detail}", "Use only conversations that this template takes"),
    "date": ("asks for today's date", "Name the date that it is to be told, such as 2024-07-26"),
    "undefined": ("uses what is not there: {detail}", _REPLACE),
    "failed": ("cannot be rendered: {detail}", _REPLACE),
    "silent": (
        "ended its process without an answer, {detail}",
        f"If `python -I -m weighbridge.reference.templates` finds its module, the template is at fault. {_REPLACE}",
    ),
}


def render_conversations(
    template: str,
    conversations: Sequence[Sequence["Message"]],
    *,
    special_tokens: Mapping[str, str],
    name: str,
    tools: "Sequence[Tools | None] | None" = None,
    date: str | None = None,
    limit_s: float = LIMIT_S,
) -> list[str]:
    """Render every conversation up to the point where the assistant is to speak.

    Parameters
    ----------
    template : str
        The chat template, in Jinja.
    conversations : Sequence[Sequence[Message]]
        The conversations. What they say is data to the template and never part of it.
    special_tokens : Mapping[str, str]
        ``bos_token``, ``eos_token`` and so on.
    name : str
        What messages call the template.
    tools : Sequence[list[dict] | None] or None, optional
        The functions that each conversation is given.
    date : str or None, optional
        The ISO date that ``strftime_now`` tells. Without one, a template that asks for the time is an error.
    limit_s : float, optional
        Seconds on the wall clock for all conversations together.

    Returns
    -------
    list[str]
        The text of each conversation, in order.

    Raises
    ------
    ConfigurationError
        The template is empty, wrong, hostile, or too large for the limits, or the date is none.
    """
    if not template.strip():
        raise ConfigurationError(f"{_one_line(name)}: there is no chat template", "Use a tokenizer that comes with one")
    if date is not None:
        try:
            datetime.date.fromisoformat(date)
        except ValueError:
            raise ConfigurationError(f"{_one_line(date)!r} is no date", "Write it as in 2024-07-26") from None
    request = {
        "template": template,
        "conversations": [[{"role": turn.role, "content": turn.content} for turn in turns] for turns in conversations],
        "tools": list(tools) if tools is not None else [None] * len(conversations),
        "special_tokens": dict(special_tokens),
        "date": date,
        "limit_s": limit_s,
    }
    reply: dict[str, Any] = {"problem": "slow"}
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-I", "-m", "weighbridge.reference.templates"],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={variable: os.environ[variable] for variable in _ENVIRONMENT if variable in os.environ},
            timeout=limit_s,
            check=False,
        )
        reply = {"problem": "silent", "detail": f"exit status {done.returncode}"}
        with contextlib.suppress(ValueError):
            reply = json.loads(done.stdout)
    if "texts" in reply:
        return [str(text) for text in reply["texts"]]
    what, next_step = _PROBLEMS[reply["problem"]]
    said = what.format(
        detail=_one_line(reply.get("detail", "")).rstrip("."),
        limit=limit_s,
        memory=MEMORY_BYTES // 2**20,
        text=TEXT_BYTES // 2**20,
    )
    raise ConfigurationError(f"The chat template of {_one_line(name)} {said}", next_step)


def _one_line(text: str) -> str:
    """The first printable characters, in one line."""
    start = text[: 4 * _DETAIL_CHARACTERS]
    words = "".join(letter if letter.isprintable() else " " for letter in start).split()
    return " ".join(words)[:_DETAIL_CHARACTERS].rstrip()


# From here on: what the process of the template runs.


class _RefusedError(TemplateError):
    """The template called ``raise_exception``."""


class _NoDateError(TemplateError):
    """The template asked for the time and was given no date."""


_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (SecurityError, "internals"),
    (_RefusedError, "refused"),
    (_NoDateError, "date"),
    (UndefinedError, "undefined"),
    (MemoryError, "memory"),
)


class _Generation(Extension):
    """``{% generation %}``, with which training finds the assistant's words; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """``dict`` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may call a field "self"
        fields = dict(*args[1:], **kwargs)
        for name in fields:
            _check_field(name)
        Namespace.__init__(args[0], fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_field(name)
        Namespace.__setitem__(self, name, value)


def _check_field(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have a field {name!r}")


def _environment(date: str | None) -> ImmutableSandboxedEnvironment:
    """The environment of transformers, without its clock and without chance."""

    def raise_exception(message: Any) -> None:
        raise _RefusedError(message)

    def strftime_now(form: str) -> str:
        if date is None:
            raise _NoDateError
        return datetime.datetime.fromisoformat(date).strftime(form)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    del environment.globals["lipsum"], environment.filters["random"]
    return environment


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """The texts of the conversations, or the kind of problem and its detail."""
    texts: list[str] = []
    size = 0
    try:
        template = _environment(request["date"]).from_string(request["template"])
        given = {**request["special_tokens"], "documents": None, "add_generation_prompt": True}
        for messages, tools in zip(request["conversations"], request["tools"], strict=True):
            pieces = []
            for piece in template.generate({**given, "messages": messages, "tools": tools}):
                size += len(piece.encode())
                if size > TEXT_BYTES:
                    return {"problem": "long"}
                pieces.append(piece)
            texts.append("".join(pieces))
    except TemplateSyntaxError as error:
        return {"problem": "syntax", "detail": f"line {error.lineno}: {error.message}"}
    except Exception as error:  # noqa: BLE001 (a template can fail in every way that Python can)
        kind = next((kind for known, kind in _KINDS if isinstance(error, known)), "failed")
        detail = {"refused": f"conversation {len(texts) + 1}: {error}", "failed": f"{type(error).__name__}: {error}"}
        return {"problem": kind, "detail": _one_line(detail.get(kind, str(error)))}
    return {"texts": texts}


def _set_limits(seconds: float) -> None:
    """Bound memory, and the processor's time in case that nobody is left to end this process; write no file."""
    try:
        import resource
    except ImportError:
        return
    cpu = math.ceil(seconds) + 1
    for which, limit in (("AS", MEMORY_BYTES), ("CPU", cpu), ("FSIZE", 0), ("CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{which}"), (limit, limit))


def _main() -> None:
    request = json.load(sys.stdin.buffer)
    _set_limits(request["limit_s"])
    reply = _answer(request)
    sys.stdout.buffer.write(json.dumps(reply, ensure_ascii=False).encode())


if __name__ == "__main__":
    _main()
