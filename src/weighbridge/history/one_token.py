"""Another monitor's record of one-token answers, judged by the same detector of change against an endpoint's own past.

Such monitors ask prompts whose first token is nearly a tie, some times a batch, and keep ``{prompt: {batch time: [[time, token], …]}}``
(Chauvin et al. 2026, "Token-Efficient Change Detection in LLM APIs").
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weighbridge.errors import ConfigurationError
from weighbridge.history.changes import BASELINE_NIGHTS, Change, first_alarm, own_past_log_e, run_length
from weighbridge.stats.changes import shiryaev_roberts

Floats = NDArray[np.float64]
MOST_BYTES = 512 * 1024 * 1024
_NUMBER = re.compile(r"[0-9]{1,30}([.][0-9]{1,30})?")


def read_one_token_history(path: Path) -> list[Change]:
    """Read such a record and find its changes; batches count as nights.

    Raises
    ------
    ConfigurationError
        If the file cannot be read, or is no such record: the first place that is wrong is named.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigurationError(f"{path} is too large", f"Split it: at most {MOST_BYTES // 2**20} MiB are read")
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})", "Check the path") from None
    except (ValueError, RecursionError):
        raise ConfigurationError(f"{path} is not JSON", "Export it again") from None
    batches = _batches(record, path)
    return changes_of_batches(path.name, batches)


def changes_of_batches(name: str, batches: dict[str, dict[str, Counter[str]]]) -> list[Change]:
    """Every change in a record: batches in the order of their times, each with the answers to each prompt.

    Parameters
    ----------
    name : str
        What the endpoint is called.
    batches : dict
        By batch time, then by prompt: how often each token was answered.
    """
    # A batch of which every answer failed says nothing, as a night without noise.
    times = sorted((time for time, prompts in batches.items() if any(prompts.values())), key=_in_time)
    found: list[Change] = []
    start = 0
    while True:
        rest = times[start:]
        scores = scores_of([batches[time] for time in rest])
        alarm = (
            first_alarm(own_past_log_e(scores), shiryaev_roberts, run_length(1))
            if len(rest) > BASELINE_NIGHTS
            else None
        )
        if alarm is None:
            return found
        index, began, log10_detector = alarm
        found.append(
            Change(
                endpoint=name, against="own past", found=rest[index], began=rest[began], log10_detector=log10_detector,
                run_length_nights=run_length(1), cause=None,
            )
        )  # fmt: skip
        start += max(began, 1)


def _in_time(time: str) -> tuple[float, str]:
    """Times are ordered as text, such as those of ISO 8601; numbers as numbers."""
    return (float(time), "") if _NUMBER.fullmatch(time) else (float("inf"), time)


def scores_of(batches: list[dict[str, Counter[str]]]) -> Floats:
    """How far each batch is from the first `weighbridge.history.changes.BASELINE_NIGHTS` ones together.

    The total variation distance between the tokens of a batch and those of the baseline in units of √(1/n + 1/m), of which it is where
    nothing changed: fewer answers are further off by chance. Averaged over the prompts that both have.
    """
    baseline: dict[str, Counter[str]] = {}
    for batch in batches[:BASELINE_NIGHTS]:
        for prompt, tokens in batch.items():
            baseline.setdefault(prompt, Counter()).update(tokens)
    return np.array([_distance(batch, baseline) for batch in batches], np.float64)


def _distance(batch: dict[str, Counter[str]], baseline: dict[str, Counter[str]]) -> float:
    distances = []
    for prompt, tokens in batch.items():
        usual = baseline.get(prompt)
        if usual and tokens:
            names = tokens.keys() | usual.keys()
            n, m = tokens.total(), usual.total()
            distances.append(sum(abs(tokens[t] / n - usual[t] / m) for t in names) / 2 / np.sqrt(1 / n + 1 / m))
    return float(np.mean(distances)) if distances else 0.0


def _batches(record: Any, path: Path) -> dict[str, dict[str, Counter[str]]]:
    def wrong(where: str, what: str) -> ConfigurationError:
        return ConfigurationError(f"{path}: {where} {what}", "Export it as {prompt: {batch time: [[time, token], …]}}")

    if not isinstance(record, dict):
        raise wrong("the whole", "is no table of prompts")
    out: dict[str, dict[str, Counter[str]]] = {}
    for prompt, of_prompt in record.items():
        if not isinstance(of_prompt, dict):
            raise wrong(f"prompt {prompt[:40]!r}", "has no table of batches")
        for time, answers in of_prompt.items():
            if not time.isprintable():
                raise wrong(f"prompt {prompt[:40]!r}, batch {time[:40]!r}", "is not called by a time")
            if not isinstance(answers, list) or not all(
                isinstance(a, list) and len(a) == 2 and (a[1] is None or isinstance(a[1], str)) for a in answers
            ):
                raise wrong(f"prompt {prompt[:40]!r}, batch {time[:40]!r}", "is no list of [time, token]")
            # An answer that failed has no token and says nothing of the model.
            out.setdefault(time, {})[prompt] = Counter(token for _, token in answers if token is not None)
    return out
