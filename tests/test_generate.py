"""The keyed generator of sealed probes, and its material."""

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from typing import Any, get_args

import pytest

from weighbridge.canonical import canonical_bytes
from weighbridge.errors import ConfigurationError
from weighbridge.probes.generate import SLOT, Family, Stream, generate_probes, load_fragments, shape_lists
from weighbridge.records import Probe

KEY = b"a key for tests only"
FAMILIES: tuple[Family, ...] = get_args(Family)
SIZES: dict[Family, int] = {"chat": 5000, "short-answer": 5000, "long": 150}
SHAPES = [(table, shape) for table in load_fragments() for shape in table["shape"]]
# Characters of the user's turns: 30 to 110 tokens of SmolLM2, 35 to 85, and 900 to 3,500.
CHARACTERS: dict[Family, tuple[int, int]] = {"chat": (60, 420), "short-answer": (75, 420), "long": (2000, 9000)}
GOLDEN = {
    "chat": "bdddf96e59269da9d7b43437f32838bc74f54a94d14fb778a97b28c01c79f211",
    "short-answer": "d388d287d20b3ac86fcb2ed9a8a5f6a7784bd85d409954859117e265977c8c15",
    "long": "905f11c1587e922b3f4943fed846b580e6e376667c3aac89d54417f1ad2fd1e1",
}

every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def pool(family: Family) -> list[Probe]:
    return generate_probes(KEY, SIZES[family], family)


def user_text(probe: Probe) -> str:
    return "\n".join(message.content for message in probe.messages if message.role == "user")


def slots(text: str) -> list[re.Match[str]]:
    return list(SLOT.finditer(text))


def list_named(slot: re.Match[str]) -> str:
    return slot["name"][0].lower() + slot["name"][1:]


# -- the draw --------------------------------------------------------------------------------------------------


@every_family
def test_the_same_key_gives_the_same_probes(family: Family) -> None:
    assert generate_probes(KEY, 40, family) == pool(family)[:40]


@every_family
def test_a_probe_does_not_depend_on_the_count(family: Family) -> None:
    for count in (1, 2, 17):
        assert generate_probes(KEY, count, family) == pool(family)[:count]


@every_family
def test_golden(family: Family) -> None:
    probes = [probe.model_dump(mode="json", exclude_none=True) for probe in pool(family)[:20]]
    assert hashlib.sha256(canonical_bytes(probes)).hexdigest() == GOLDEN[family]


@every_family
def test_texts_and_ids_are_distinct(family: Family) -> None:
    assert len({probe.id for probe in pool(family)}) == SIZES[family]
    assert len({canonical_bytes([m.model_dump() for m in probe.messages]) for probe in pool(family)}) == SIZES[family]


@every_family
def test_another_key_gives_the_same_ids_and_other_texts(family: Family) -> None:
    other = generate_probes(KEY[:-1] + b"!", 100, family)
    assert [probe.id for probe in other] == [probe.id for probe in pool(family)[:100]]
    assert not {user_text(probe) for probe in other} & {user_text(probe) for probe in pool(family)}


def test_a_key_of_too_few_bits_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="a key of 15 bytes"):
        generate_probes(KEY[:15], 1, "chat")


@pytest.mark.parametrize("count", [-1, 0, 100_001])
def test_a_count_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{count} probes"):
        generate_probes(KEY, count, "chat")


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no family 'poem'"):
        generate_probes(KEY, 1, "poem")  # type: ignore[arg-type]


def test_choices_are_even() -> None:
    stream = Stream(KEY, "even")
    counts = Counter(stream.below(7) for _ in range(70_000))
    assert sorted(counts) == list(range(7))
    assert all(abs(count - 10_000) < 400 for count in counts.values())  # more than four standard deviations


def test_words_that_would_favour_some_values_are_dropped() -> None:
    stream = Stream(KEY, "dropped")
    stream._words = iter([2**64 - 1, 2**63 + 5, 4])
    assert stream.below(2**63 + 1) == 4  # any word from 2**63 + 1 on is past the last whole multiple


# -- the texts -------------------------------------------------------------------------------------------------


@every_family
def test_texts_are_clean(family: Family) -> None:
    for probe in pool(family):
        for message in probe.messages:
            text = message.content
            assert text
            assert text == text.strip()
            assert text.replace("\n", "").isprintable()
            assert unicodedata.is_normalized("NFC", text)
            assert not slots(text)
            assert "<user>" not in text
            assert "  " not in text.replace("\n    ", "\n").replace("\n  ", "\n")
            assert "://" not in text


@every_family
def test_lengths_are_bounded(family: Family) -> None:
    lengths = [len(user_text(probe)) for probe in pool(family)]
    low, high = CHARACTERS[family]
    assert low <= min(lengths)
    assert max(lengths) <= high


@every_family
def test_conversations_end_with_the_user_and_turns_alternate(family: Family) -> None:
    for probe in pool(family):
        roles = [message.role for message in probe.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]


def test_some_chats_have_a_system_message_and_some_have_several_turns() -> None:
    with_system = sum(probe.messages[0].role == "system" for probe in pool("chat"))
    with_turns = sum(any(message.role == "assistant" for message in probe.messages) for probe in pool("chat"))
    assert 0.08 < with_system / SIZES["chat"] < 0.25
    assert 0.04 < with_turns / SIZES["chat"] < 0.25


@every_family
def test_every_language_and_shape_occurs(family: Family) -> None:
    drawn = {probe.purpose for probe in pool(family)}
    assert drawn == {f"{s['purpose']} ({t['language']})" for t, s in SHAPES if s["family"] == family}


def test_english_has_its_share() -> None:
    english = sum("(English)" in probe.purpose for probe in pool("chat"))
    assert 0.52 < english / SIZES["chat"] < 0.58
    assert sum(t["share"] for t in load_fragments() if t["language"] != "mixed") == 100


# -- the material ----------------------------------------------------------------------------------------------


def reached(table: dict[str, Any], shape: dict[str, Any]) -> set[str]:
    """The lists that a shape's forms lead to; fails on a slot that names none or asks for more than there is."""
    lists = shape_lists(table, shape)
    seen: set[str] = set()
    todo = [*shape["forms"], *(["{system}"] if shape["family"] == "chat" else [])]
    while todo:
        for slot in slots(todo.pop()):
            if slot["low"]:
                assert int(slot["low"]) < int(slot["high"]), slot[0]
                continue
            name = list_named(slot)
            if slot["between"] == ",":  # lines may follow one pattern, but no enumeration names a thing twice
                assert len(lists[name]) >= int(slot["most"]), slot[0]
            if name not in seen:
                seen.add(name)
                todo += lists[name]
    return seen


def test_every_list_is_reached() -> None:
    for table in load_fragments():
        used: set[str] = set()
        for shape in table["shape"]:
            names = reached(table, shape)
            assert {name for name, value in shape.items() if isinstance(value, list)} - names == {"forms"}
            used |= names
        assert set(table["lists"]) <= used, table["language"]


def test_no_entry_stands_twice_in_a_list() -> None:
    for table, shape in SHAPES:
        for name, entries in shape_lists(table, shape).items():
            assert len(set(entries)) == len(entries), (table["language"], shape["purpose"], name)


def test_no_brace_is_left_that_only_looks_like_a_slot() -> None:
    for table, shape in SHAPES:
        for entries in shape_lists(table, shape).values():
            for entry in entries:
                assert not re.search(r"\{[\w#,;|<-]*\}", SLOT.sub("", entry)), entry


def ways(text: str, lists: dict[str, list[str]], seen: dict[str, int]) -> float:
    """A lower bound on the texts that a text with slots can become; what is remembered counts once."""
    total = 1.0
    for slot in slots(text):
        if slot["low"]:
            total *= len(range(int(slot["low"]), int(slot["high"]) + 1, int(slot["step"] or 1)))
            continue
        name = list_named(slot)
        if slot["memory"]:
            if seen.get(slot[0].lower()):
                continue
            seen[slot[0].lower()] = 1
        each = sum(ways(entry, lists, {}) for entry in lists[name]) / len(lists[name])
        for _ in range(int(slot["least"] or 1)):
            left = len(lists[name]) - seen.get(name, 0)
            seen[name] = seen.get(name, 0) + 1
            total *= max(left, 1) * (1.0 if slot["between"] == "<" else each)
    return total


def test_an_english_shape_has_at_least_a_thousand_million_texts() -> None:
    english = [(t, s) for t, s in SHAPES if t["language"] == "English" and s["family"] == "chat"]
    assert len(english) >= 12
    for table, shape in english:
        count = sum(ways(form, shape_lists(table, shape), {}) for form in shape["forms"])
        assert count > 1e9, (shape["purpose"], count)
