"""The three pictures of a report, as SVG text that is the same for the same numbers.

Nothing rests on colour: honest stacks are circles, variants squares, the endpoint a diamond, and every picture
has its table beside it.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, SOFT, MARKED, _HONEST = "#1d2733", "#66717e", "#9b2d1f", "#d5e6dc"
FOREMOST = 12  # directions that are drawn
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "weighbridge", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT, "text.color": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def scale_plot(details: dict[str, Any]) -> str:
    """Residual scale of the endpoint against every recorded stack, on a logarithmic axis."""

    def paint(axes: Axes) -> None:
        ladder = details["ladder"]
        endpoint = details["endpoint_noise_nats"]
        axes.axvspan(1e-9, details["null_scale_nats"], color=_HONEST, zorder=0)
        axes.axvline(endpoint["value"], color=MARKED, linewidth=1, zorder=1)
        for height, row in enumerate(ladder, start=1):
            marker = "o" if row["honest"] else "s"
            axes.plot([row["p05_nats"], row["p95_nats"]], [height, height], color=SOFT, linewidth=2, zorder=2)
            axes.plot(
                row["noise_nats"],
                height,
                marker,
                color=INK,
                markerfacecolor="white" if row["honest"] else INK,
                zorder=3,
            )
        axes.plot([endpoint["low"], endpoint["high"]], [0, 0], color=MARKED, linewidth=3, zorder=2)
        axes.plot(endpoint["value"], 0, "D", color=MARKED, markersize=8, zorder=3)
        axes.set_yticks(range(len(ladder) + 1), ["this endpoint", *(row["stack"] for row in ladder)], fontsize=8)
        axes.set_ylim(-0.8, len(ladder) + 0.8)
        axes.set_xscale("log")
        lowest = min([endpoint["low"], *(row["p05_nats"] for row in ladder)])
        axes.set_xlim(lowest / 1.5, max([endpoint["high"], *(row["p95_nats"] for row in ladder)]) * 1.5)
        axes.set_xlabel("distance from the reference, nats (log scale)")

    return svg(
        paint,
        height=0.22 * (len(details["ladder"]) + 1) + 0.9,
        title="Distance from the reference: this endpoint and every recorded stack",
    )


def direction_plot(details: dict[str, Any]) -> str:
    """Cosine of the endpoint's residual with each variant's."""

    def paint(axes: Axes) -> None:
        rows = _foremost(details)
        for height, row in enumerate(rows):
            axes.plot(
                [-1, row["honest_at_most"]],
                [height, height],
                color=_HONEST,
                linewidth=12,
                solid_capstyle="butt",
                zorder=0,
            )
            axes.plot([row["low"], row["high"]], [height, height], color=SOFT, linewidth=2, zorder=2)
            axes.plot(row["cosine"], height, "s", color=INK, zorder=3)
        axes.axvline(0, color=SOFT, linewidth=0.6)
        axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axes.set_xlim(-1, 1.05)
        axes.set_xlabel("cosine with this endpoint's residual")

    return svg(
        paint,
        height=0.34 * len(_foremost(details)) + 0.9,
        title="Direction of the residual: agreement with each recorded variant",
    )


def _foremost(details: dict[str, Any]) -> list[dict[str, Any]]:
    """The directions that agree most, the best last; the table beside the picture has them all."""
    return sorted(details["directions"], key=lambda row: float(row["cosine"]))[-FOREMOST:]


def course_plot(details: dict[str, Any], threshold: float) -> str:
    """Evidence against the honest library after each answer."""

    def paint(axes: Axes) -> None:
        course = details["course"]
        answers = range(1, len(course) + 1)
        axes.axhline(threshold, color=MARKED, linewidth=1, linestyle="--")
        axes.text(1, threshold, " differs", va="bottom", color=MARKED)
        axes.plot(answers, [max(row["log10_e_size"], -6) for row in course], color=SOFT, linestyle=":", label="by size")
        axes.plot(
            answers,
            [max(row["log10_e_direction"], -6) for row in course],
            color=SOFT,
            linestyle="--",
            label="by direction",
        )
        axes.plot(
            answers, [max(row["log10_e"], -6) for row in course], color=INK, linewidth=2, marker=".", label="together"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("answers with logprobs")
        axes.set_ylabel("log10 of the evidence (e-value)")
        axes.legend(frameon=False, loc="best")

    return svg(paint, height=3.0, title="Evidence against the honest library after each answer")


def text_course_plot(course: list[dict[str, Any]], threshold: float, *, whole: bool = False) -> str:
    """Evidence against the honest library after each text, a first token or a whole answer, and which of them were not the reference's."""

    def paint(axes: Axes) -> None:
        answers = range(1, len(course) + 1)
        axes.axhline(threshold, color=MARKED, linewidth=1, linestyle="--")
        axes.text(1, threshold, " differs", va="bottom", color=MARKED)
        axes.plot(
            answers, [max(row["log10_e"], -6) for row in course], color=INK, linewidth=2, marker=".", label="evidence"
        )
        before = [0, *(row["flips"] for row in course)]
        others = [n for n in answers if before[n] > before[n - 1]]
        axes.plot(
            others,
            [max(course[n - 1]["log10_e"], -6) for n in others],
            "s",
            color=MARKED,
            markersize=6,
            linestyle="none",
            label="stands out" if whole else "not the reference's",
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("whole answers, and then repeats" if whole else "answers, one token each")
        axes.set_ylabel("log10 of the evidence (e-value)")
        axes.legend(frameon=False, loc="best")

    return svg(
        paint,
        height=3.0,
        title=f"Evidence against the honest library after each {'whole answer' if whole else 'first token'}",
    )


def text_departures_plot(details: dict[str, Any]) -> str:
    """How well each recorded departure explains the answers."""

    def paint(axes: Axes) -> None:
        rows = list(reversed(details["text_departures"][:FOREMOST]))
        for height, row in enumerate(rows):
            axes.plot([0, row["log10_gain"]], [height, height], color=SOFT, linewidth=2, zorder=2)
            axes.plot(row["log10_gain"], height, "s" if row["is_weights"] else "^", color=INK, zorder=3)
        axes.axvline(0, color=SOFT, linewidth=0.6)
        axes.set_yticks(range(len(rows)), [row["recorded_as"] for row in rows])
        axes.set_xlabel("log10 of the gain over noise of any size")

    rows = min(FOREMOST, len(details["text_departures"]))
    return svg(paint, height=0.34 * rows + 0.9, title="How well each recorded departure explains the answers")


def svg(paint: Callable[[Axes], None], *, height: float, title: str) -> str:
    """Draw one picture as SVG text, the same bytes for the same numbers, without dates or addresses."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        paint(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The page sets the width; the picture keeps its proportions. Ids are made unique for several pictures on a page.
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    prefix = re.sub(r"[^a-z]", "", title.lower())[:12]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
