"""What `text_only.py --out` writes: the targets, tables beside the field's methods and the bound, and a picture of both."""

from pathlib import Path
from typing import Any

import numpy as np

from figures import Document

OURS, BOUND, FIELD = "#9b2d1f", "#1d2733", ("#3b6ea5", "#5e8c4a")
OTHERS = "not_the_reference's"
MARGIN = "Token-DiFR margin, requests for a power of 0.9 at 1/1000"


def _number(value: Any) -> tuple[float, bool]:
    """A number of requests, and whether it is only a lower limit ("> 190")."""
    return float(str(value).removeprefix("> ")), str(value).startswith(">")


def _pair(pair: tuple[float, float]) -> str:
    return " / ".join("not within the pool" if not np.isfinite(n) else f"{n:g}" for n in pair)


def table(document: Document) -> str:
    """Everything as Markdown."""
    reported = document.reported
    lines = [
        "# benchmarks/text_only.py",
        "",
        f"Commit {document.as_json()['commit'][:12]}. Bundle smollm2-135m-instruct. What calibrates, and what is reported on, stands at the head of the script.",
        "",
        "| | figure | value | target |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {'holds' if f.holds else '**missed**'} | {name.replace('_', ' ')} ({f.unit}) | {f.value:.4g} | {f.target} |"
        for name, f in document.figures.items()
    ]
    if "L4" in reported:
        lines += [
            "",
            f"Temperature 0, one-token requests with repeats; {reported['L4_contexts']}:",
            "",
            "| served | to e ≥ 1000, median / 90 % | other answers | Token-DiFR margin, power .9 at 1/1000 | knowing only how often: log 1000 over the divergence | exact variant named |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in reported["L4"].items():
            named = row.get("exact_variant_named", {})
            lines.append(
                f"| {name} | {_pair(row['differs_median_p90'])} | {row[OTHERS]} of {row['contexts']} | "
                f"{reported.get(MARGIN, {}).get(name, '')} | {row['bound_by_flips']:g} | {', '.join(f'{v} {s:.2f}' for v, s in named.items())} |"
            )
    if "L5" in reported:
        lines += [
            "",
            "Temperature 1, output tokens:",
            "",
            "| served | to e ≥ 1000, median / 90 % | likelihood ratio of one who knows variant and temperature (Neyman-Pearson), median / 90 % | MET, power .9 at 1/1000 | RUT, power .9 at 1/1000 |",
            "|---|---|---|---|---|",
        ]
        for name, row in reported["L5"].items():
            met = "" if "MET" not in row else f"{'> ' if row['MET_given_up'] else ''}{row['MET']:g}"
            exact = row.get("exact_likelihood_ratio_median_p90")
            lines.append(
                f"| {name} | {_pair(row['tokens_median_p90'])} | {_pair(exact) if exact else ''} | {met} | {row.get('RUT', '')} |"
            )
    for key, title in (("honest_left_out", "Honest stacks, family left out, simulated"), ("unrecorded", "Draws at a temperature that is not known, from departures of a class that the library holds none of, simulated: requests until told"), ("evasion", "Endpoints that hide what they serve")):  # fmt: skip
        if key in reported:
            lines += ["", f"{title}:", ""]
            lines += [f"- {name}: {_words(value)}" for name, value in reported[key].items()]
    return "\n".join(lines) + "\n"


def _words(value: Any) -> str:
    if isinstance(value, dict) and "sentence" in value:
        also = "".join(f" Also inconsistent: {what}." for what in value["also_inconsistent"])
        return f"{value['requests']} requests. {value['sentence']}{also}"
    return str(value)


def plot(document: Document, path: Path) -> None:
    """Requests and tokens that each method needs, on a logarithmic scale; an arrow where it needs more than was tried."""
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

    def dot(axis: Axes, x: float, y: float, style: tuple[str, str], label: str, *, more: bool) -> None:
        colour, marker = style
        axis.plot(x, y, marker, color=colour, markersize=6, label=label, linestyle="none")
        if more:
            axis.annotate(
                "", (x * 1.5, y), (x * 1.08, y), arrowprops={"arrowstyle": "->", "color": colour}, annotation_clip=False
            )

    def ours(axis: Axes, pair: tuple[float, float], y: float) -> None:
        if np.isfinite(pair[0]):
            axis.plot(pair[0], y, "o", color=OURS, markersize=7, label="ours, median to 90 %", linestyle="none")
            if np.isfinite(pair[1]):
                axis.plot(pair, (y, y), "-", color=OURS, linewidth=2)

    cold = {n: r for n, r in document.reported.get("L4", {}).items() if np.isfinite(r["differs_median_p90"][0])}
    drawn = {n: r for n, r in document.reported.get("L5", {}).items() if "MET" in r}
    with mpl.rc_context({
        "svg.hashsalt": "weighbridge", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    }):  # fmt: skip
        picture = Picture(figsize=(9, 1.6 + 0.3 * (len(cold) + len(drawn))), layout="constrained")
        first, second = picture.subplots(2, 1, height_ratios=[max(len(cold), 1), max(len(drawn), 1) + 1])
        for y, (name, row) in enumerate(cold.items()):
            ours(first, row["differs_median_p90"], y)
            dot(
                first, row["bound_by_flips"], y, (BOUND, "|"), "knowing only how often another answer comes", more=False
            )
            needed, more = _number(document.reported[MARGIN][name])
            dot(first, needed, y, (FIELD[0], "s"), "Token-DiFR margin, power .9 at 1/1000", more=more)
        for y, row in enumerate(drawn.values()):
            ours(second, row["tokens_median_p90"], y)
            exact = row["exact_likelihood_ratio_median_p90"][0]
            if np.isfinite(exact):
                dot(second, exact, y, (BOUND, "|"), "likelihood ratio (Neyman-Pearson), median", more=False)
            dot(second, row["MET"], y, (FIELD[0], "^"), "MET, power .9 at 1/1000", more=row["MET_given_up"])
            needed, more = _number(row["RUT"])
            dot(second, needed, y, (FIELD[1], "v"), "RUT, power .9 at 1/1000", more=more)
        for axis, names, title, unit in (
            (first, list(cold), "Temperature 0", "one-token requests, repeats included"),
            (second, list(drawn), "Temperature 1", "output tokens"),
        ):
            axis.set_xscale("log")
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.set_title(title, loc="left")
            axis.set_xlabel(unit)
            axis.grid(axis="x", color="#dde2e7", linewidth=0.6)
            handles, labels = axis.get_legend_handles_labels()
            unique = dict(zip(labels, handles, strict=True))
            axis.legend(
                unique.values(), unique.keys(), frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
            )
        metadata = {"Date": None} if path.suffix == ".svg" else None
        picture.savefig(path, format=path.suffix.lstrip("."), metadata=metadata)
