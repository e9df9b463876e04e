"""The licence of the weights as data: its text by hash, what it asks of a host by quote and place, and what changed.

Nothing is interpreted: a keeper quotes the text, the quote must stand in it word for word (line breaks and
indentation aside), and a later text is compared with the recorded one.
"""

import difflib
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from weighbridge.canonical import sha256_hex
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.records import Record

MAX_TEXT_BYTES = 2**20
MAX_TEXT_LINES = 10_000
MAX_DIFF_LINES = 400
HEADING_CHARACTERS = 60
TEXT_NAME = "licence.txt"

_HEADING = re.compile(r"#{1,6} |(?i:section|article) \d|(\d+(\.\d+)*[.)]|\d+(\.\d+)+)\s+[A-Z]")
_SENTENCE_END = re.compile(r"(?<=[.;:!?]) |(?<=[.;:!?][\"”’)\]]) ")
# Words that ask something, or that limit what is granted. Too many beat too few: a person reads each sentence.
_OBLIGATION = re.compile(
    r"\b(must|shall|requir|oblig|may not|will not|cannot|not permitted|prohibit|forbid|restrict|only (if|for)|provided that"
    r"|subject to|prior written|consent|authori[sz]|permission|non-?commercial|commercial|monthly active|active users"
    r"|built with|prominent|display|attribution|notices?\b|royalt|fees?\b|pay|agree|compl[yi]|responsib|indemnif|terminat"
    r"|revo[ck]|contact)",
    re.IGNORECASE,
)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _path_inside(value: str) -> str:
    if not value or "\\" in value or not value.isprintable():
        raise ValueError("must be a path such as licences/apache-2.0.txt")
    if PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts:
        raise ValueError("must be a path below the spec's folder, without ..")
    return value


class LicenceAsk(Record):
    """Something that a licence asks of a host, or grants, in its own words."""

    kind: Literal[
        "commercial_use", "notice", "attribution", "user_threshold", "use_restriction", "redistribution", "contact", "other",
    ]  # fmt: skip
    quote: Annotated[str, AfterValidator(_one_line), Field(min_length=10, max_length=1000)]


class RecordedAsk(LicenceAsk):
    """An ask and where it stands: its lines in the recorded text and the nearest heading above, cut."""

    place: str = Field(max_length=200)


class LicenceSpec(Record):
    """The ``[licence]`` table of a reference SPEC.toml."""

    identifier: str = Field(min_length=1, max_length=100, description="SPDX, or the text's own name")
    file: Annotated[str, AfterValidator(_path_inside)] = Field(description="the text, relative to the spec")
    source: str = Field(min_length=1, max_length=1000, description="where the text came from")
    asks: list[LicenceAsk] = Field(min_length=1, max_length=100)


class LicenceRecord(Record):
    """The licence in a bundle's manifest; the text itself is the bundle's ``licence.txt``."""

    identifier: str = Field(min_length=1, max_length=100)
    source: str = Field(min_length=1, max_length=1000)
    text_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    lines: int = Field(ge=0)
    asks: list[RecordedAsk] = Field(max_length=100)


class LicenceChange(Record):
    """What differs between the recorded text and a new one."""

    same: bool = Field(description="the bytes are equal")
    same_words: bool = Field(description="equal but for white space")
    kept: list[RecordedAsk] = Field(
        description="asks whose quote stands in the new text; places are the recorded text's"
    )
    lost: list[RecordedAsk] = Field(description="asks whose quote no longer stands in the text")
    new_obligations: list[str] = Field(description="sentences with a word of obligation that the old text lacks")
    diff: list[str] = Field(description="unified diff, at most 400 lines")
    diff_lines_left_out: int


def read_text(path: Path) -> bytes:
    """Read the text of a licence; ConfigurationError if it is missing, too large or not UTF-8."""
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}", "Check the path")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error})", "Check the file") from None
    if len(data) > MAX_TEXT_BYTES or data.count(b"\n") > MAX_TEXT_LINES:
        raise ConfigurationError(f"{path} is larger than 1 MiB or {MAX_TEXT_LINES} lines", "Name a licence's text")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not UTF-8", "Save the licence's text as UTF-8") from None
    return data


def read_licence(spec: LicenceSpec, folder: Path) -> tuple[LicenceRecord, bytes]:
    """Read the text that a spec names and find each quote in it.

    Parameters
    ----------
    spec : LicenceSpec
        The spec's ``[licence]`` table.
    folder : Path
        The folder of the spec.

    Returns
    -------
    tuple of LicenceRecord and bytes
        What the manifest holds, and the text for ``licence.txt``.

    Raises
    ------
    ConfigurationError
        If the text cannot be read, or a quote does not stand in it: nothing is guessed.
    """
    path = folder / spec.file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigurationError(f"field licence.file: {path} leads out of {folder}", "Put the text next to the spec")
    data = read_text(path)
    text = data.decode("utf-8")
    asks = []
    for index, ask in enumerate(spec.asks):
        place = find_place(text, ask.quote)
        if place is None:
            raise ConfigurationError(
                f"{path}: field licence.asks.{index}.quote does not stand in the text: {ask.quote[:80]!a}",
                "Copy it from the text word for word, or remove the ask",
            )
        asks.append(RecordedAsk(kind=ask.kind, quote=ask.quote, place=place))
    digest, lines = sha256_hex(data), len(data.splitlines())
    return LicenceRecord(
        identifier=spec.identifier, source=spec.source, text_sha256=digest, lines=lines, asks=asks
    ), data


def bundled_text(record: LicenceRecord, folder: Path) -> str:
    """A bundle's ``licence.txt``; BundleError unless it has the manifest's hash and holds each quote at its place."""
    path = folder / TEXT_NAME
    try:
        data = read_text(path)
    except ConfigurationError as error:
        raise BundleError(error.what, "Fetch the whole bundle again") from None
    if sha256_hex(data) != record.text_sha256:
        raise BundleError(f"{path} does not have the hash that its manifest names", "Fetch the bundle again")
    text = data.decode("utf-8")
    for index, ask in enumerate(record.asks):
        if find_place(text, ask.quote) != ask.place:
            what = f"{path}: the quote of licence.asks.{index} does not stand where the manifest says"
            raise BundleError(what, "Do not use this bundle")
    return text


def find_place(text: str, quote: str) -> str | None:
    """Where a quote first stands, such as ``lines 94-95, under "4. Redistribution."``; None where it does not."""
    found = re.search(r"\s++".join(map(re.escape, quote.split())), text)
    if found is None:
        return None
    first, last = text.count("\n", 0, found.start()), text.count("\n", 0, found.end())
    place = f"line {first + 1}" if first == last else f"lines {first + 1}-{last + 1}"
    lines = text.split("\n")
    heading = next((_one_line(lines[n]) for n in range(first, -1, -1) if _is_heading(lines, n)), None)
    if heading is None:
        return place
    cut = heading if len(heading) <= HEADING_CHARACTERS else heading[: HEADING_CHARACTERS - 1].rstrip() + "…"
    return f'{place}, under "{cut}"'


def compare_licence(record: LicenceRecord, recorded_text: str, new_text: str) -> LicenceChange:
    """What a new text of a licence changes.

    A sentence counts as new unless the old text holds it whole: a condition that falls away changes what is asked.
    """
    old_words, new_words = _one_line(recorded_text), _one_line(new_text)
    old_sentences = set(_SENTENCE_END.split(old_words))
    sentences = dict.fromkeys(_SENTENCE_END.split(new_words))
    old_lines = [line.rstrip() for line in recorded_text.split("\n")]
    new_lines = [line.rstrip() for line in new_text.split("\n")]
    diff = list(difflib.unified_diff(old_lines, new_lines, "recorded", "new", lineterm=""))
    return LicenceChange(
        same=sha256_hex(new_text.encode()) == record.text_sha256,
        same_words=old_words == new_words,
        kept=[ask for ask in record.asks if ask.quote in new_words],
        lost=[ask for ask in record.asks if ask.quote not in new_words],
        new_obligations=[s for s in sentences if s not in old_sentences and _OBLIGATION.search(s)],
        diff=diff[:MAX_DIFF_LINES],
        diff_lines_left_out=max(0, len(diff) - MAX_DIFF_LINES),
    )


def _is_heading(lines: list[str], number: int) -> bool:
    line = lines[number].strip()
    if _HEADING.match(line):
        return True
    alone = not any(lines[n].strip() for n in (number - 1, number + 1) if 0 <= n < len(lines))
    return alone and line.isupper() and sum(c.isalpha() for c in line) >= 4
