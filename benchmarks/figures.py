"""The document that every benchmark prints: figures with targets, and what is only reported."""

import json
import math
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy import special

CACHE = Path(__file__).resolve().parent.parent / ".benchmarks-cache"


@dataclass(frozen=True)
class Figure:
    """One number that has a target; `holds` says whether it is met."""

    value: float
    unit: str
    target: str
    holds: bool
    interval: tuple[float, float] | None = None


@dataclass
class Document:
    """What a benchmark found."""

    name: str
    figures: dict[str, Figure] = field(default_factory=dict)
    reported: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The document as a JSON value."""
        return {
            "schema": f"weighbridge/benchmark/{self.name}/1",
            "commit": _commit(),
            "machine": f"{platform.system()} {platform.machine()}, {_processors()} processors, Python {platform.python_version()}",
            "figures": _finite({name: asdict(figure) for name, figure in self.figures.items()}),
            "reported": _finite(self.reported),
        }

    def print(self, as_json: bool) -> int:
        """Print to stdout; returns 0 if every target holds, else 1."""
        holds = all(figure.holds for figure in self.figures.values())
        if as_json:
            print(json.dumps(self.as_json(), indent=1, sort_keys=True))
        else:
            for name, figure in self.figures.items():
                print(
                    f"{'holds ' if figure.holds else 'MISSED'} {name}: {figure.value:g} {figure.unit} (target {figure.target})"
                )
            for name, value in self.reported.items():
                print(f"       {name}: {value}")
        return 0 if holds else 1


def _finite(value: Any) -> Any:
    """A JSON value: what is not reached is null, since JSON knows no infinity."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def share(found: int, of: int) -> tuple[float, tuple[float, float]]:
    """A share with its 95 % Clopper-Pearson interval."""
    low = 0.0 if found == 0 else float(special.betaincinv(found, of - found + 1, 0.025))
    high = 1.0 if found == of else float(special.betaincinv(found + 1, of - found, 0.975))
    return found / max(of, 1), (low, high)


def say(line: str) -> None:
    """Talk on stderr."""
    print(line, file=sys.stderr, flush=True)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=CACHE.parent)
    return done.stdout.strip() or "unknown"


def _processors() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
