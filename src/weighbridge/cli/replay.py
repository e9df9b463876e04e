"""weighbridge replay."""

from pathlib import Path

import click

from weighbridge.audit import bundle_of, exit_code
from weighbridge.cli.common import fail_on_option, json_option, judge_and_report, show_run
from weighbridge.store import RunFolder


@click.command("replay")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--reference", help="Where the reference bundle is now.")
@fail_on_option
@json_option
def replay_command(run: Path, reference: str | None, fail_on: str, as_json: bool) -> int:
    """Judge a run again from its exchanges: no network, no key."""
    folder = RunFolder(run)
    judged = judge_and_report(folder, bundle_of(folder.plan(), reference))
    show_run(folder, *judged, as_json)
    return exit_code(judged[2], fail_on)
