"""Where a whole answer leaves the reference's own one.

At temperature 0 the reference's answer is one path of tokens. Another answer shares its beginning and leaves it at one token; which token that
was is told from the text alone, as far as the text tells it. What comes after it has another beginning than what was recorded, and says nothing.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

WHITE_SPACE = b" \t\r\n\v\f"


@dataclass(frozen=True)
class Leaving:
    """How far an answer goes along the path, and by which tokens it can have left it.

    Attributes
    ----------
    kept : int
        Tokens of the path with which the answer surely begins.
    cells : tuple of tuple of int
        Position and column of every token by which it can have left; the column after the last one stands for what is not listed. None where
        it did not leave the path.
    counts : bool
        Whether it may be held against anybody; what a gateway may have written may not.
    """

    kept: int
    cells: tuple[tuple[int, int], ...] = ()
    counts: bool = True


def leaving(
    answer: bytes, tokens: Sequence[bytes], listed: Sequence[Sequence[bytes]], own: Sequence[int], *, ended: bool
) -> Leaving:
    """Compare an answer with the path.

    The same text may be that of other tokens, so every place is looked at up to the one where the texts part: a listed token that agrees with the
    rest of the answer is one by which the path may have been left. Where the answer is only shorter it has left the path where its turn has
    ended; else it was cut short, which says nothing.

    Parameters
    ----------
    answer : bytes
        Without white space at its ends, as servers show it.
    tokens : sequence of bytes
        Those of the path; L of them.
    listed : sequence of sequence of bytes
        The tokens that are known at each of the L positions; the end of a turn is empty.
    own : sequence of int
        Which of these is the path's own.
    ended : bool
        Whether the host said that the turn has ended.
    """
    tokens, listed = [*tokens], [[*row] for row in listed]
    tokens[0], listed[0] = tokens[0].lstrip(WHITE_SPACE), [token.lstrip(WHITE_SPACE) for token in listed[0]]
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token))
    path = b"".join(tokens)
    if answer.startswith(path.rstrip(WHITE_SPACE)):
        return Leaving(len(tokens))
    common = next((i for i, (a, b) in enumerate(zip(answer, path, strict=False)) if a != b), len(answer))
    if common == len(answer) and not ended:
        return Leaving(sum(end <= common for end in starts[1:]))
    # Servers take white space off an answer's end: what is left may stop short of the token at which the turn ended.
    last = next(i for i, end in enumerate(starts[1:]) if end > common)
    cells = []
    for i in range(last + 1):
        rest = answer[starts[i] :]
        for column, token in enumerate(listed[i]):
            ends = not token and not rest
            goes_on = bool(token) and bool(rest) and (rest.startswith(token) or token.startswith(rest))
            if column != own[i] and (goes_on or (ends and common == len(answer))):
                cells.append((i, column))
    if not any(position == last for position, _ in cells):
        cells.append((last, len(listed[last])))
    return Leaving(min(position for position, _ in cells), tuple(cells))


_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."})  # fmt: skip


def folded(text: bytes) -> bytes:
    """A text without what some hosts change in passing: kinds of quotes and dashes, compatibility characters."""
    known = text.decode("utf-8", "surrogateescape").translate(_PLAIN)
    return unicodedata.normalize("NFKC", known).encode("utf-8", "surrogateescape")
