"""The embedded pool, pools from folders, and the keyed draw."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge.errors import ConfigurationError
from weighbridge.probes import Pool, draw, load_pool
from weighbridge.records import Probe

few = settings(derandomize=True, deadline=None, max_examples=40)
DESCRIPTION = """
schema = "weighbridge/pool/1"
id = "mine"
version = 3
lifecycle = "draft"
visibility = "private"
family = "test"
motivation = "none"
cost = "none"
needs = "nothing"
licence = "none"
"""


@pytest.fixture(scope="module")
def embedded() -> Pool:
    return load_pool("chat-one-token")


def text_of(probe: Probe) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in probe.messages)


def line_of(probe_id: str, content: str = "Say a word.") -> str:
    probe = {"id": probe_id, "purpose": "test", "messages": [{"role": "user", "content": content}]}
    return json.dumps(probe, ensure_ascii=False)


def pool_folder(folder: Path, *lines: str) -> str:
    (folder / "pool.toml").write_text(DESCRIPTION, "utf-8")
    (folder / "probes.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return str(folder)


# -- the embedded pool -----------------------------------------------------------------------------------------


def test_the_embedded_pool_is_large_enough(embedded: Pool) -> None:
    assert len(embedded.probes) >= 400


def test_ids_are_unique(embedded: Pool) -> None:
    assert len({probe.id for probe in embedded.probes}) == len(embedded.probes)


def test_texts_are_unique(embedded: Pool) -> None:
    assert len({text_of(probe) for probe in embedded.probes}) == len(embedded.probes)


def test_last_questions_are_unique_but_for_case_and_space(embedded: Pool) -> None:
    texts = [
        " ".join(" ".join(content for _, content in text_of(probe)).casefold().split()) for probe in embedded.probes
    ]
    assert len(set(texts)) == len(texts)


def test_every_probe_has_a_purpose(embedded: Pool) -> None:
    assert [probe.id for probe in embedded.probes if not probe.purpose.strip()] == []


def test_every_conversation_ends_with_a_user_turn(embedded: Pool) -> None:
    assert [probe.id for probe in embedded.probes if probe.messages[-1].role != "user"] == []


def test_roles_alternate_after_an_optional_system_turn(embedded: Pool) -> None:
    def is_regular(probe: Probe) -> bool:
        roles = [message.role for message in probe.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        return turns == ["user" if n % 2 == 0 else "assistant" for n in range(len(turns))]

    assert [probe.id for probe in embedded.probes if not is_regular(probe)] == []


def test_no_first_message_is_a_single_word(embedded: Pool) -> None:
    assert [probe.id for probe in embedded.probes if len(probe.messages[0].content.split()) < 2] == []


def test_no_message_is_empty_or_padded(embedded: Pool) -> None:
    contents = [message.content for probe in embedded.probes for message in probe.messages]
    assert [content for content in contents if not content.strip() or content != content.strip()] == []


def test_the_description_names_the_pool(embedded: Pool) -> None:
    assert embedded.description.id == "chat-one-token"
    assert embedded.identity.id == "chat-one-token"


# -- the draw --------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=12), unique=True, max_size=40), st.text(max_size=40))
@few
def test_a_draw_is_a_permutation(ids: list[str], seed: str) -> None:
    assert sorted(draw(ids, seed)) == sorted(ids)


@given(st.lists(st.text(max_size=12), unique=True, max_size=40), st.text(max_size=40))
@few
def test_a_draw_depends_on_seed_and_ids_only(ids: list[str], seed: str) -> None:
    assert draw(ids[::-1], seed) == draw(ids, seed)


@given(st.lists(st.text(max_size=12), unique=True, min_size=1, max_size=40), st.text(max_size=40), st.data())
@few
def test_what_is_left_out_does_not_change_the_order_of_the_rest(ids: list[str], seed: str, data: st.DataObject) -> None:
    kept = set(data.draw(st.lists(st.sampled_from(ids), unique=True)))
    assert draw([i for i in ids if i in kept], seed) == [i for i in draw(ids, seed) if i in kept]


def test_every_prefix_of_a_draw_is_the_shorter_audit(embedded: Pool) -> None:
    order = draw([probe.id for probe in embedded.probes], "a seed")
    for size in (1, 10, 98):
        prefix = order[:size]
        assert len(set(prefix)) == size
        assert draw(prefix, "a seed") == prefix


def test_different_seeds_give_different_orders(embedded: Pool) -> None:
    ids = [probe.id for probe in embedded.probes]
    orders = {tuple(draw(ids, f"seed {n}")) for n in range(50)}
    assert len(orders) == 50


def test_every_probe_comes_first_now_and_then() -> None:
    ids = [f"p-{n}" for n in range(10)]
    firsts = [draw(ids, f"seed {n}")[0] for n in range(1000)]
    assert all(60 <= firsts.count(i) <= 140 for i in ids)


# -- pools from folders ----------------------------------------------------------------------------------------


def test_a_folder_is_a_pool(tmp_path: Path) -> None:
    pool = load_pool(pool_folder(tmp_path, line_of("a-1"), line_of("a-2", "Another.")))
    assert [probe.id for probe in pool.probes] == ["a-1", "a-2"]
    assert pool.identity.version == 3


def test_the_identity_changes_with_any_word(tmp_path: Path) -> None:
    first = load_pool(pool_folder(tmp_path, line_of("a-1"))).identity
    second = load_pool(pool_folder(tmp_path, line_of("a-1", "Say a werd."))).identity
    assert first.sha256 != second.sha256


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        pytest.param("{", "not JSON", id="torn"),
        pytest.param("", "not JSON", id="empty"),
        pytest.param("[]", "line 2", id="list"),
        pytest.param('{"id": "a-2"}', "purpose", id="field-missing"),
        pytest.param(line_of("Bad Id"), "id", id="bad-id"),
        pytest.param(line_of("a-2").replace('"user"', '"tool"'), "role", id="bad-role"),
        pytest.param('{"id": "a-2", "purpose": "p", "messages": []}', "messages", id="no-messages"),
        pytest.param(line_of("a-2")[:-1] + ', "answer": "42"}', "unknown field answer", id="unknown-field"),
        pytest.param(line_of("a-1", "Another."), "a-1 stands twice", id="duplicate-id"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, bad: str, says: str) -> None:
    folder = pool_folder(tmp_path, line_of("a-1"), bad, line_of("a-3"))
    with pytest.raises(ConfigurationError) as raised:
        load_pool(folder)
    assert f"{tmp_path / 'probes.jsonl'}, line 2" in str(raised.value)
    assert says in str(raised.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str) -> None:
    """JSON allows these characters in a string as they are; str.splitlines would cut there."""
    pool = load_pool(pool_folder(tmp_path, line_of("a-1", f"One{separator}two.")))
    assert pool.probes[0].messages[0].content == f"One{separator}two."


def test_an_unknown_pool_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="no pool 'nowhere'"):
        load_pool("nowhere")


def test_a_folder_without_probes_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "pool.toml").write_text(DESCRIPTION, "utf-8")
    with pytest.raises(ConfigurationError, match=r"probes\.jsonl"):
        load_pool(str(tmp_path))


def test_probes_that_are_not_text_are_a_configuration_error(tmp_path: Path) -> None:
    folder = pool_folder(tmp_path)
    (tmp_path / "probes.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(ConfigurationError, match=r"probes\.jsonl"):
        load_pool(folder)
