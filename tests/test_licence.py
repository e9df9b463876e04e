"""The licence of the weights as data: quotes with their places, and what a later text changes."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from weighbridge.canonical import sha256_hex
from weighbridge.cli import reference_licence
from weighbridge.cli.reference_licence import change_lines, check_licence
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.records import checked
from weighbridge.reference.licence import (
    MAX_DIFF_LINES,
    MAX_TEXT_BYTES,
    MAX_TEXT_LINES,
    LicenceRecord,
    LicenceSpec,
    bundled_text,
    compare_licence,
    find_place,
    read_licence,
)

LICENCES = Path(__file__).resolve().parent.parent / "reference_outputs" / "specs" / "licences"
OLD = """\
EXAMPLE COMMUNITY LICENCE, VERSION 1

1. Grant
You may use, reproduce and distribute the Example Materials without a fee.

2. Redistribution
(a) You shall provide a copy of this licence with the Example Materials.
(b) You shall prominently display "Built with
    Example" on a related website or product documentation.
(c) You must retain the notice "Example is licensed
    under the Example Community Licence" in a Notice file.

3. Large providers
If You have more than 700 million monthly active users, You must hold our
prior written authorisation.

4. Contact
Ask licences@example.org for that authorisation.
"""
NEW = OLD.replace(
    """(c) You must retain the notice "Example is licensed
    under the Example Community Licence" in a Notice file.
""",
    "",
).replace("without a fee.\n", "without a fee. You shall not offer the Example Materials as a paid service.\n")
QUOTES = [
    ("commercial_use", "use, reproduce and distribute the Example Materials"),
    ("attribution", 'prominently display "Built with Example"'),
    ("notice", 'retain the notice "Example is licensed under the Example Community Licence"'),
    ("user_threshold", "more than 700 million monthly active users"),
    ("use_restriction", "You must hold our prior written authorisation."),
    ("contact", "licences@example.org"),
]


def spec_of(*quotes: tuple[str, str], file: str = "licence-1.txt") -> LicenceSpec:
    asks = [{"kind": kind, "quote": quote} for kind, quote in quotes]
    table = {"identifier": "Example Community Licence", "file": file, "source": "invented", "asks": asks}
    return checked(LicenceSpec, table, "SPEC.toml")


@pytest.fixture
def old(tmp_path: Path) -> LicenceRecord:
    (tmp_path / "licence-1.txt").write_text(OLD)
    record, data = read_licence(spec_of(*QUOTES), tmp_path)
    assert data == OLD.encode()
    return record


# -- quotes ----------------------------------------------------------------------------------------------------


def test_each_quote_has_its_place(old: LicenceRecord) -> None:
    assert [ask.place for ask in old.asks] == [
        'line 4, under "1. Grant"',
        'lines 8-9, under "2. Redistribution"',
        'lines 10-11, under "2. Redistribution"',
        'line 14, under "3. Large providers"',
        'lines 14-15, under "3. Large providers"',
        'line 18, under "4. Contact"',
    ]
    assert (old.lines, old.text_sha256) == (18, sha256_hex(OLD.encode()))


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_quote_may_be_split_over_lines_on_either_side(ending: str) -> None:
    text = "# Terms\n\nYou must\n\tdo this.\n".replace("\n", ending)
    assert find_place(text, "You  must do\nthis.") == 'lines 3-4, under "# Terms"'


def test_a_place_without_a_heading_and_a_long_heading() -> None:
    assert find_place("you must do this\n", "must do this") == "line 1"
    assert find_place(f"\n{'LONG ' * 30}\n\nyou must\n", "you must") == f'line 4, under "{("LONG " * 12).rstrip()}…"'
    # Capitals inside a paragraph are shouting, and a wrapped number is a number.
    assert find_place("TERMS OF USE\n\nfor\nANY REASON AT ALL\n1.5 of you must\n", "you must") == (
        'line 5, under "TERMS OF USE"'
    )


@pytest.mark.parametrize("quote", ["You may ignore all of this", "you shall provide a copy", "700 million-ish users"])
def test_a_quote_that_does_not_stand_in_the_text_is_refused(tmp_path: Path, quote: str) -> None:
    (tmp_path / "licence-1.txt").write_text(OLD)
    with pytest.raises(ConfigurationError, match=r"licence-1.txt: field licence.asks.1.quote") as caught:
        read_licence(spec_of(QUOTES[0], ("other", quote)), tmp_path)
    assert quote in str(caught.value)
    assert "Copy it from the text word for word" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("quote", ["short", " " * 40, "x" * 1001, "a" + " " * 20 + "b"])
def test_a_quote_has_ten_to_a_thousand_characters_beside_white_space(quote: str) -> None:
    with pytest.raises(ConfigurationError, match=r"field asks.0.quote"):
        spec_of(("other", quote))


@pytest.mark.parametrize("file", ["/etc/passwd", "../licence-1.txt", "a/../../b.txt", "", "a\\b.txt", "a\nb.txt"])
def test_a_file_outside_the_folder_is_refused(file: str) -> None:
    with pytest.raises(ConfigurationError, match="field file"):
        spec_of(*QUOTES, file=file)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "licence-1.txt").write_text(OLD)
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec" / "licence-1.txt").symlink_to(tmp_path / "licence-1.txt")
    with pytest.raises(ConfigurationError, match="leads out of"):
        read_licence(spec_of(*QUOTES), tmp_path / "spec")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (OLD.encode("utf-16"), "is not UTF-8"),
        (OLD.encode() + b" " * MAX_TEXT_BYTES, "is larger than"),
        (OLD.encode() + "é".encode() * MAX_TEXT_BYTES, "is larger than"),
        (OLD.encode() + b"\n" * MAX_TEXT_LINES, "is larger than"),
        (None, "there is no file"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path: Path, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / "licence-1.txt").write_bytes(data)
    with pytest.raises(ConfigurationError, match=message):
        read_licence(spec_of(*QUOTES), tmp_path)


def test_a_bundled_text_is_the_one_of_the_manifest(tmp_path: Path, old: LicenceRecord) -> None:
    with pytest.raises(BundleError, match="there is no file"):
        bundled_text(old, tmp_path)
    (tmp_path / "licence.txt").write_text(OLD)
    assert bundled_text(old, tmp_path) == OLD
    moved = old.model_copy(update={"asks": [old.asks[0].model_copy(update={"quote": "You may do as You like"})]})
    with pytest.raises(BundleError, match=r"licence.asks.0 does not stand"):
        bundled_text(moved, tmp_path)
    (tmp_path / "licence.txt").write_text(NEW)
    with pytest.raises(BundleError, match="does not have the hash"):
        bundled_text(old, tmp_path)


def test_the_apache_licence_is_the_published_text() -> None:
    data = (LICENCES / "apache-2.0.txt").read_bytes()
    assert sha256_hex(data) == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert find_place(data.decode(), "You must give any other recipients of the Work") == (
        'line 95, under "4. Redistribution. You may reproduce and distribute copies…"'
    )


# -- changes ---------------------------------------------------------------------------------------------------


def test_a_new_restriction_and_a_dropped_notice_are_reported(old: LicenceRecord) -> None:
    change = compare_licence(old, OLD, NEW)
    assert (change.same, change.same_words) == (False, False)
    assert [ask.kind for ask in change.lost] == ["notice"]
    assert len(change.kept) == len(QUOTES) - 1
    assert change.new_obligations == ["You shall not offer the Example Materials as a paid service."]
    assert "-(c) You must retain the notice \"Example is licensed" in change.diff  # fmt: skip
    assert change.diff_lines_left_out == 0


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("700 million", "1 million", "1 million monthly active users"),
        ("If You have more than 700 million monthly active users, ", "", "You must hold our prior written"),
        ("Ask licences@example.org", "Write to us and pay. Ask licences@example.org", "Write to us and pay."),
    ],
)
def test_an_obligation_that_changes_is_a_new_one(old: LicenceRecord, before: str, after: str, sentence: str) -> None:
    found = compare_licence(old, OLD, OLD.replace("\n", " ").replace(before, after)).new_obligations
    assert any(sentence in new for new in found), found


@pytest.mark.parametrize("new", [OLD.replace("\n", "\r\n"), " ".join(OLD.split()), OLD.replace("\n", "\n\n    ")])
def test_white_space_changes_no_words(old: LicenceRecord, new: str) -> None:
    change = compare_licence(old, OLD, new)
    assert (change.same, change.same_words, change.lost, change.new_obligations) == (False, True, [], [])


@given(st.text())
def test_a_text_is_the_same_as_itself(text: str) -> None:
    record = LicenceRecord(
        identifier="x", source="invented", text_sha256=sha256_hex(text.encode()), lines=text.count("\n"), asks=[]
    )
    change = compare_licence(record, text, text)
    assert (change.same, change.same_words, change.new_obligations, change.diff) == (True, True, [], [])


@given(st.text(), st.text(min_size=1))
def test_a_quote_of_the_text_is_found_in_it(before: str, quote: str) -> None:
    assert (find_place(f"{before} {quote} after", quote) is not None) or not quote.split()


def test_a_long_diff_is_cut(old: LicenceRecord) -> None:
    change = compare_licence(old, OLD, "x\n" * (2 * MAX_DIFF_LINES))
    assert len(change.diff) == MAX_DIFF_LINES
    assert change.diff_lines_left_out > 0
    assert "more lines of the diff" in change_lines(old, change)[-1]


# -- the command -----------------------------------------------------------------------------------------------


@dataclass
class Ended:
    code: Any
    out: str


@pytest.fixture
def check(tmp_path: Path, old: LicenceRecord, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on a stand-in for a bundle and a new text."""
    (tmp_path / "licence.txt").write_text(OLD)

    def run(new: str, *options: str, record: LicenceRecord | None = old) -> Ended:
        bundle = SimpleNamespace(
            manifest=SimpleNamespace(id="example", licence=record),
            identity=SimpleNamespace(digest="0" * 64),
            path=tmp_path,
        )
        monkeypatch.setattr(reference_licence, "load_bundle", lambda name: bundle)
        (tmp_path / "new.txt").write_text(new)
        done = CliRunner().invoke(
            check_licence, ["example", str(tmp_path / "new.txt"), *options], standalone_mode=False
        )
        if done.exception is not None:
            raise done.exception
        return Ended(done.return_value, done.stdout)

    return run


def test_the_same_words_end_with_0(check: Any) -> None:
    assert check(OLD) == Ended(0, "Example Community Licence: the same text\n")
    assert check(OLD + "\n").code == 0


def test_a_change_ends_with_1_and_says_what(check: Any) -> None:
    ended = check(NEW)
    lines = ended.out.splitlines()
    assert ended.code == 1
    assert lines[0] == "Example Community Licence: the text has changed; 5 of 6 quotes still stand"
    assert lines[1].startswith('lost (notice, lines 10-11, under "2. Redistribution"): retain the notice')
    assert lines[2] == "new obligation: You shall not offer the Example Materials as a paid service."
    assert lines[3:5] == ["--- recorded", "+++ new"]


def test_json_is_one_document(check: Any) -> None:
    ended = check(NEW + "\x9b2J must", "--json")
    document = json.loads(ended.out)
    assert ended.code == 1
    assert document["schema"] == "weighbridge/licence-check/1"
    assert [ask["kind"] for ask in document["lost"]] == ["notice"]
    assert document["new_obligations"][-1] == "\x9b2J must"
    assert ended.out.isascii()


def test_nothing_steers_the_terminal(check: Any) -> None:
    out = check(NEW + "You must \x1b[2J\x1b]0;x\x07 read \u202e\x9b this.\n").out
    assert all(line.isprintable() for line in out.split("\n"))
    assert "You must \ufffd[2J" in out


def test_a_bundle_without_a_licence_is_refused(check: Any) -> None:
    with pytest.raises(BundleError, match="holds no licence text"):
        check(NEW, record=None)
