"""requests.csv: the observed facts of every request as a table, for a spreadsheet."""

import json
from pathlib import Path

import pandas as pd

from weighbridge.canonical import write_atomically
from weighbridge.records import Observation

# Lists, and what a model wrote: a table is for numbers.
_LEFT_OUT = ("schema_", "top", "quirks", "positions", "drawn", "text", "listing", "record")
_COLUMNS = [name for name in Observation.model_fields if name not in _LEFT_OUT]
_STARTS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_table(folder: Path) -> None:
    """Write requests.csv from observations.jsonl. No cell that an endpoint filled is read as a formula."""
    lines = (folder / "observations.jsonl").read_text("utf-8").split("\n")
    table = pd.DataFrame([json.loads(line) for line in lines if line], columns=_COLUMNS)
    for name in ("fault", "fault_detail", "model_named", "provider_named", "fingerprint", "finish_reason", "answer_id"):
        table[name] = table[name].map(
            lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(_STARTS_A_FORMULA) else cell
        )
    write_atomically(folder / "requests.csv", table.to_csv(index=False, lineterminator="\n").encode())
