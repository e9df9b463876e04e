"""weighbridge demo."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weighbridge.cli.common import json_option, judge_and_report, print_json, progress_bar, talk
from weighbridge.demo import DEMO_VARIANTS, MAX_REQUESTS, DemoResult, run_demo
from weighbridge.report.html import MARKS, WORDS


@click.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The folder for the runs. Default: a new one under reports/."
)
@click.option("--seed", help="The seed of the draws. Default: a fresh one.")
@click.option(
    "--max-requests",
    type=click.IntRange(10, 400),
    default=MAX_REQUESTS,
    show_default=True,
    help="Requests for each endpoint.",
)
@json_option
def demo_command(out: Path | None, seed: str | None, max_requests: int, as_json: bool) -> int:
    """Audit honest and dishonest endpoints of a real model on this machine."""
    folder = out or Path("reports") / f"demo-{datetime.now(UTC):%Y%m%dT%H%M%S}"

    def say(line: str) -> None:
        talk.print(line, markup=False, highlight=False)

    results = []
    for result in run_demo(folder, seed, max_requests, say, progress_bar, judge_and_report):
        results.append(result)
        say(
            f"{len(results)} of {len(DEMO_VARIANTS)}: {result.truth} → {result.verdict}{f', {result.cause}' if result.cause else ''} ({result.requests} requests, {result.seconds:.0f} s)"
        )
    right = all(result.as_expected for result in results)
    if as_json:
        print_json({"schema": "weighbridge/demo/1", "folder": str(folder), "results": [r.row() for r in results]})
    else:
        _print_table(results, folder, right)
        _open(folder / DEMO_VARIANTS[3] / "report.html")
    return 0 if right else 1


def _print_table(results: list[DemoResult], folder: Path, right: bool) -> None:
    console = Console()
    table = Table(
        title="Six endpoints that all claim: SmolLM2-135M-Instruct, 16 bit",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("what it really is", no_wrap=True)
    for heading in ("verdict", "cause", "requests", "seconds", "right"):
        table.add_column(heading)
    for r in results:
        style = {"consistent": "green", "differs": "red"}.get(r.verdict, "yellow")
        table.add_row(
            r.truth, Text(f"{MARKS[r.verdict]} {WORDS[r.verdict]}", style), (r.cause or "–").replace("_", " "),
            str(r.requests), f"{r.seconds:.0f}", "yes" if r.as_expected else f"no: {r.expected_cause or 'consistent'}",
        )  # fmt: skip
    console.print(table)
    console.print(f"reports: {folder}/*/report.html", markup=False, highlight=False)
    if not right:
        console.print("Not every verdict is as expected.", style="bold red")


def _open(page: Path) -> None:
    """Open a report where somebody can see it."""
    has_screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.stdout.isatty() and has_screen:
        click.launch(page.resolve().as_uri())
