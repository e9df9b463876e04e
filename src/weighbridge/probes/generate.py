"""Texts for sealed pools, drawn from a secret key: whoever lacks the key cannot foresee them.

The material stands in `fragments/*.toml`, one file a language or family. A file has a `share` (how often it is
chosen), `lists` of fragments, and shapes. A shape has a family, a purpose, forms (whole texts with slots) and lists
of its own, which hide those of the file. Slots, which may hold slots again:

==================  ============================================================================================
``{8-40}``          a whole number, both ends included; ``{100-900/50}`` in steps of 50
``{name}``          an entry of the list `name`, none twice in a text before all were drawn; ``{Name}`` capitalised
``{name#1}``        the same, remembered: wherever it stands in this text, it is the same entry
``{name,3-5}``      three to five entries, separated by commas
``{row;3-5}``       three to five entries on lines of their own; ``{row<3-5}`` in sorted order
``{paragraph|3-5}`` three to five entries with blank lines between
==================  ============================================================================================

``<system>``, ``<user>`` and ``<assistant>`` in a form begin a turn; without one it is a single turn of the user's.
"""

import functools
import hmac
import itertools
import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, Literal, TypeVar, get_args

from weighbridge.errors import ConfigurationError
from weighbridge.records import Message, Probe

Family = Literal["chat", "short-answer", "long"]
Lists = dict[str, list[str]]
T = TypeVar("T")

MIN_KEY_BYTES = 16
MAX_COUNT = 100_000
SLOT = re.compile(
    r"\{(?:(?P<low>\d+)-(?P<high>\d+)(?:/(?P<step>\d+))?"
    r"|(?P<name>[A-Za-z_]+)(?:#(?P<memory>\d)|(?P<between>[,;<|])(?P<least>\d+)-(?P<most>\d+))?)\}"
)
TURN = re.compile(r"<(system|user|assistant)>")
BETWEEN = {",": ", ", ";": "\n", "<": "\n", "|": "\n\n"}


@functools.cache
def load_fragments() -> tuple[dict[str, Any], ...]:
    """The material, one table a file, in the order of the files' names."""
    folder = resources.files("weighbridge.probes") / "fragments"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return tuple(tomllib.loads(f.read_text("utf-8")) for f in files)


def shape_lists(table: dict[str, Any], shape: dict[str, Any]) -> Lists:
    """The lists that a shape's slots name: the file's, hidden by the shape's own."""
    own = {name: value for name, value in shape.items() if isinstance(value, list)}
    lists: Lists = {**table["lists"], **own}
    return lists


class Stream:
    """Unbiased choices from the words of HMAC-SHA-256(key, family|index|counter) for the counters 0, 1, 2 and on.

    Parameters
    ----------
    key : bytes
        The secret.
    label : str
        Family and index: each probe has a stream of its own.
    """

    def __init__(self, key: bytes, label: str) -> None:
        self._words = self._blocks(key, label)

    @staticmethod
    def _blocks(key: bytes, label: str) -> Iterator[int]:
        for counter in itertools.count():
            block = hmac.digest(key, f"{label}|{counter}".encode(), "sha256")
            for start in range(0, 32, 8):
                yield int.from_bytes(block[start : start + 8], "big")

    def below(self, limit: int) -> int:
        """A whole number from 0 to `limit` - 1, each as likely: words past the last whole multiple are dropped."""
        end = 2**64 - 2**64 % limit
        return next(word for word in self._words if word < end) % limit

    def choice(self, values: Sequence[T]) -> T:
        """One of the values, each as likely."""
        return values[self.below(len(values))]


def _expand(text: str, lists: Lists, stream: Stream, memory: dict[str, str], used: dict[str, set[str]]) -> str:
    """Fill the slots of a text, from left to right."""

    def entry(name: str) -> str:
        before = used.setdefault(name, set())
        if len(before) == len(lists[name]):
            before.clear()
        drawn = stream.choice([value for value in lists[name] if value not in before])
        before.add(drawn)
        return _expand(drawn, lists, stream, memory, used)

    def fill(slot: re.Match[str]) -> str:
        if slot["low"]:
            values = range(int(slot["low"]), int(slot["high"]) + 1, int(slot["step"] or 1))
            return str(stream.choice(values))
        name = slot["name"][0].lower() + slot["name"][1:]
        if slot["between"]:
            least, most = int(slot["least"]), int(slot["most"])
            parts = [entry(name) for _ in range(least + stream.below(most - least + 1))]
            return BETWEEN[slot["between"]].join(sorted(parts) if slot["between"] == "<" else parts)
        if slot["memory"]:
            remembered = f"{name}#{slot['memory']}"
            value = memory[remembered] if remembered in memory else memory.setdefault(remembered, entry(name))
        else:
            value = entry(name)
        return value if name == slot["name"] else value[0].upper() + value[1:]

    return SLOT.sub(fill, text)


def _draw_text(family: Family, stream: Stream) -> tuple[str, str]:
    """Draw a purpose and a text, with its turns still marked."""
    tables = [t for t in load_fragments() if any(s["family"] == family for s in t["shape"])]
    table = stream.choice([t for t in tables for _ in range(t["share"])])
    shape = stream.choice([s for s in table["shape"] if s["family"] == family])
    form = stream.choice(shape["forms"])
    lists = shape_lists(table, shape)
    if family == "chat" and "<" not in form and stream.below(8) == 0:
        form = f"<system>{stream.choice(lists['system'])}<user>{form}"
    return f"{shape['purpose']} ({table['language']})", _expand(form, lists, stream, {}, {})


def generate_probes(key: bytes, count: int, family: Family) -> list[Probe]:
    """Generate the first `count` probes of a family from a secret key.

    The same key, family and number give the same probe, whatever the count. No two texts of a family are equal: a
    text that an earlier probe has is drawn again, from the same stream.

    Raises
    ------
    ConfigurationError
        If the key is shorter than 128 bits, or the count or the family cannot be.
    """
    if len(key) < MIN_KEY_BYTES:
        raise ConfigurationError(
            f"a key of {len(key)} bytes can be guessed", f"Give at least {MIN_KEY_BYTES} random bytes"
        )
    if not 1 <= count <= MAX_COUNT:
        raise ConfigurationError(f"{count} probes cannot be generated", f"Ask for 1 to {MAX_COUNT}")
    if family not in get_args(Family):
        raise ConfigurationError(f"there is no family {family!r}", f"Name one of: {', '.join(get_args(Family))}")
    probes: dict[str, Probe] = {}
    for index in range(1, count + 1):
        stream = Stream(key, f"{family}|{index}")
        purpose, text = _draw_text(family, stream)
        while text in probes:
            purpose, text = _draw_text(family, stream)
        turns = TURN.split(text if text.startswith("<") else f"<user>{text}")[1:]
        messages = [
            Message.model_validate({"role": role, "content": content.strip()})
            for role, content in zip(turns[::2], turns[1::2], strict=True)
        ]
        probes[text] = Probe(id=f"sealed-{family}-{index:05}", purpose=purpose, messages=messages)
    return list(probes.values())
