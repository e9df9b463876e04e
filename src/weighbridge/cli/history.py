"""weighbridge history."""

from collections.abc import Sequence
from pathlib import Path

import click
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weighbridge.canonical import rounded
from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.errors import ConfigurationError
from weighbridge.history.changes import LOOKED_AT, Change, changes_of, run_length
from weighbridge.history.index import INDEX, Run, endpoints, opened, refresh, runs
from weighbridge.history.one_token import read_one_token_history
from weighbridge.history.pools import LOOKED_AT as POOLS_LOOKED_AT
from weighbridge.history.pools import PoolsDisagree, pools_that_disagree
from weighbridge.report.course import SHOWN, table_of_nights, write_course

NIGHTS_SHOWN = 30


@click.command("history")
@click.argument("endpoint", required=False)
@click.option(
    "--runs",
    "root",
    type=click.Path(path_type=Path),
    default=Path("reports"),
    show_default=True,
    help="The folder under which run folders lie.",
)
@click.option("--rebuild", is_flag=True, help="Make the index again from the run folders.")
@click.option("--csv", "as_csv", is_flag=True, help="Print all runs as CSV.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.svg", help="Draw the nights of one endpoint.")
@click.option(
    "--one-token",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Judge another monitor's record of one-token answers instead: {prompt: {batch time: [[time, token], …]}}.",
)
@json_option
def history_command(
    endpoint: str | None, root: Path, rebuild: bool, as_csv: bool, plot: Path | None, one_token: Path | None, as_json: bool
) -> int:  # fmt: skip
    """Show what was said of every endpoint, night by night, and the nights on which one changed."""
    if one_token is not None:
        _show([], {one_token.name: read_one_token_history(one_token)}, as_json, 1)
        return 0
    if not root.is_dir():
        raise ConfigurationError(f"there is no folder {root}", "Name the folder of your runs with --runs")
    if rebuild:
        for suffix in ("", "-wal", "-shm"):
            (root / f"{INDEX}{suffix}").unlink(missing_ok=True)
    with opened(root, _say) as connection:
        refresh(connection, root, _say)
        names = endpoints(connection)
        everything = as_json or as_csv or plot is not None
        whole = runs(connection, endpoint=endpoint, last=None if everything else NIGHTS_SHOWN)
        looked_at = runs(connection, endpoint=endpoint, columns=LOOKED_AT)
        disagree = pools_that_disagree(runs(connection, endpoint=endpoint, columns=POOLS_LOOKED_AT))
    if endpoint is not None and not whole:
        known = ", ".join(names[:10]) or "none"
        raise ConfigurationError(f"no run of {endpoint!r} lies under {root}", f"Known endpoints: {known}")
    if plot is not None and endpoint is None:
        raise ConfigurationError("--plot needs an endpoint", "Name one: weighbridge history ENDPOINT --plot FILE.svg")
    by_endpoint: dict[str, list[Run]] = {}
    for run in looked_at:
        by_endpoint.setdefault(run["endpoint"], []).append(run)
    changes = {name: changes_of(own, run_length(len(names))) for name, own in by_endpoint.items()}
    if plot is not None and endpoint is not None:
        try:
            write_course(plot, whole, changes[endpoint], f"Nights of {endpoint}")
        except OSError as error:
            raise ConfigurationError(f"{plot} cannot be written ({error.strerror})", "Choose another file") from None
        _say(f"drawn: {plot}")
    if as_csv:
        _print_csv(whole)
        return 0
    _show(whole, changes, as_json, len(names), len(looked_at), disagree)
    return 0


def _print_csv(whole: list[Run]) -> None:
    click.echo(pd.DataFrame(table_of_nights(whole), columns=list(SHOWN)).to_csv(index=False), nl=False)


def _show(
    whole: list[Run],
    changes: dict[str, list[Change]],
    as_json: bool,
    among: int,
    count: int = 0,
    disagree: Sequence[PoolsDisagree] = (),
) -> None:
    found = [vars(change) for of_endpoint in changes.values() for change in of_endpoint]
    if as_json:
        document = {
            "schema": "weighbridge/history/1", "runs": table_of_nights(whole), "changes": found,
            "average_run_length_nights": run_length(among), "pools_disagree": [vars(one) | {"sentence": one.sentence} for one in disagree],
        }  # fmt: skip
        print_json(rounded(document))
        return
    if whole:
        table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
        for heading in (
            "night",
            "endpoint",
            "verdict",
            "cause",
            "noise, nats",
            "requests",
            "errors",
            "USD",
            "latency, s",
        ):
            table.add_column(heading, no_wrap=heading in ("night", "verdict"), overflow="fold")
        for run in whole:
            table.add_row(
                run["night"], escape(run["endpoint"]), run["verdict"].replace("_", " "), run["cause"] or "", _number(run["noise_nats"]),
                str(run["requests_sent"]), str(run["errors"]), _number(run["cost_usd"]), _number(run["latency_s"]),
            )  # fmt: skip
        Console().print(table)
        if count > len(whole):
            _say(f"the last {len(whole)} of {count} runs; all of them: --csv or --json")
    for change in found:
        Console().print(
            f"{change['endpoint']}: changed on {change['began']} against {'the reference' if change['against'] == 'reference' else 'its own past'}, "
            f"found on {change['found']} (detector 10^{change['log10_detector']:.1f}; without a change one is found every {change['run_length_nights']:.0f} nights at most)",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    for one in disagree:
        Console().print(one.sentence, markup=False, highlight=False, soft_wrap=True)
    if not found:
        _say("no change was found")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _say(text: str) -> None:
    talk.print(text, markup=False, highlight=False, soft_wrap=True)
