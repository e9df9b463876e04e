"""One question a module: a pure function from a case to a finding. Their prose stands in ``checks.toml``."""

from functools import lru_cache
from pathlib import Path

from weighbridge.records import Record, read_toml


class Prose(Record):
    """What a check is called, what it measures, what it does not prove, how a host mends it, and what it costs."""

    title: str
    measures: str
    does_not_prove: str
    fix: str
    cost: str


class _Prose(Record):
    route: Prose
    prompt: Prose
    sampling: Prose
    weights: Prose
    share: Prose
    counting: Prose
    parameters: Prose
    caching: Prose
    reasoning: Prose


@lru_cache(maxsize=1)
def prose() -> dict[str, Prose]:
    """The prose of every check, by its name, in the order of the file."""
    read = read_toml(_Prose, Path(__file__).with_name("checks.toml"))
    return {name: getattr(read, name) for name in _Prose.model_fields}
