"""weighbridge audit."""

from pathlib import Path
from typing import Any

import click

from weighbridge.audit import collect_run, exit_code
from weighbridge.cli.common import (
    collection_options,
    endpoint_from,
    endpoint_options,
    fail_on_option,
    json_option,
    judge_and_report,
    new_run_folder,
    progress_bar,
    reference_of,
    show_run,
    talk,
)
from weighbridge.judge.policy import load_policy
from weighbridge.keys import key_for
from weighbridge.plan import make_plan
from weighbridge.records import LogprobLevel
from weighbridge.store import RunFolder


@click.command("audit")
@endpoint_options
@collection_options
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder. Default: a new one under reports/.")
@fail_on_option
@json_option
def audit_command(
    out: Path | None, seed: str | None, level: LogprobLevel, fleet_size: int, fail_on: str, as_json: bool, **named: Any
) -> int:
    """Audit one endpoint: collect, judge and report."""
    endpoint = endpoint_from(**named)
    bundle = reference_of(endpoint)
    plan = make_plan(endpoint, load_policy(endpoint.policy), bundle, level=level, fleet_size=fleet_size, seed=seed)
    key = key_for(endpoint.api_key_env, endpoint.origin)
    folder = RunFolder.create(out or new_run_folder(endpoint), plan)
    talk.print(
        f"auditing {endpoint.name}: at most {plan.estimate.requests} requests, run folder {folder.path}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    try:
        with progress_bar(endpoint.name) as onlooker:
            collect_run(folder, plan, endpoint, bundle, key, onlooker)
    except KeyboardInterrupt:
        talk.print(
            f"interrupted; what was collected is kept. Go on with: weighbridge resume {folder.path}",
            markup=False,
            highlight=False,
        )
        return 130
    judged = judge_and_report(folder, bundle)
    show_run(folder, *judged, as_json)
    return exit_code(judged[2], fail_on)
