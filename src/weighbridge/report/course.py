"""A picture of an endpoint's nights: distance from the reference, verdict, and the night on which it changed."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from weighbridge.canonical import write_atomically
from weighbridge.history.changes import Change
from weighbridge.history.index import Run
from weighbridge.report.junit import clean
from weighbridge.report.plots import INK, MARKED, SOFT, svg

SHOWN = (
    "night", "endpoint", "verdict", "cause", "exact_variant", "noise_nats", "noise_low_nats", "noise_high_nats", "log10_e_value",
    "answers_used", "requests_sent", "errors", "prompt_tokens", "completion_tokens", "cost_usd", "latency_s", "first_token_s",
    "tokens_per_s", "policy", "weighbridge_version", "folder",
)  # fmt: skip
_MARKS: dict[str, tuple[str, str, str]] = {
    "consistent": ("o", "white", "consistent"), "inconclusive": ("D", SOFT, "not verified"), "differs": ("s", INK, "differs"),
}  # fmt: skip
MOST_TICKS = 8


def course_of_nights(runs: list[Run], changes: list[Change], title: str) -> str:
    """Effective noise night by night, as SVG text; nights without one stand at the bottom."""

    def paint(axes: Axes) -> None:
        nights = [run["night"] for run in runs]
        noise = np.array([run["noise_nats"] or np.nan for run in runs], np.float64)
        lowest = float(np.nanmin(noise)) / 2 if np.isfinite(noise).any() else 1e-3
        for word, (marker, fill, label) in _MARKS.items():
            at = [i for i, run in enumerate(runs) if run["verdict"].startswith(word)]
            if at:
                heights = [noise[i] if np.isfinite(noise[i]) else lowest for i in at]
                axes.plot(
                    at,
                    heights,
                    marker,
                    color=INK,
                    markerfacecolor=fill,
                    markersize=5,
                    linestyle="none",
                    label=label,
                    zorder=3,
                )
        for i, run in enumerate(runs):
            if run["noise_low_nats"] and run["noise_high_nats"]:
                axes.plot([i, i], [run["noise_low_nats"], run["noise_high_nats"]], color=SOFT, linewidth=1, zorder=2)
        for change in changes:
            at_night = nights.index(change.began)
            axes.axvline(at_night - 0.5, color=MARKED, linewidth=1.2, linestyle="--", zorder=1)
            axes.annotate(
                f" changed {change.began}", (at_night - 0.5, 1), xycoords=("data", "axes fraction"), va="top", color=MARKED, fontsize=8
            )  # fmt: skip
        axes.set_yscale("log")
        every = max(1, -(-len(nights) // MOST_TICKS))
        axes.set_xticks(range(0, len(nights), every), nights[::every], rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("distance from the reference, nats")
        axes.legend(frameon=False, loc="best", fontsize=8)

    # An endpoint may be called anything, and the title stands in an attribute.
    return svg(paint, height=3.2, title=escape(clean(title)))


def write_course(path: Path, runs: list[Run], changes: list[Change], title: str) -> None:
    """Write the picture."""
    write_atomically(path, course_of_nights(runs, changes, title).encode())


def table_of_nights(runs: list[Run]) -> list[dict[str, Any]]:
    """The columns that are shown, in the order in which they are."""
    return [{name: run[name] for name in SHOWN} for run in runs]
