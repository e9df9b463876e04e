"""weighbridge audit."""

from pathlib import Path
from typing import Any

import click

from weighbridge.audit import collect_run, exit_code
from weighbridge.cli.common import (
    collect_controls,
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
from weighbridge.errors import ConfigurationError
from weighbridge.judge.policy import load_policy
from weighbridge.keys import key_for
from weighbridge.plan import make_plan
from weighbridge.records import Endpoint, LogprobLevel, read_toml
from weighbridge.store import RunFolder


@click.command("audit")
@endpoint_options
@collection_options
@click.option(
    "--control-honest",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="An endpoint that is known to be honest, such as the lab's or one of yours: audited likewise; unless it is consistent, nothing is said.",
)
@click.option(
    "--control-altered",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="An endpoint that is known to be altered: audited likewise; unless it differs, nothing is said.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder. Default: a new one under reports/.")
@fail_on_option
@json_option
def audit_command(
    control_honest: Path | None, control_altered: Path | None, out: Path | None, seed: str | None, level: LogprobLevel,
    fleet_size: int, fail_on: str, as_json: bool, **named: Any,
) -> int:  # fmt: skip
    """Audit one endpoint: collect, judge and report."""
    endpoint = endpoint_from(**named)
    controls = {
        kind: read_toml(Endpoint, file)
        for kind, file in (("honest", control_honest), ("altered", control_altered)) if file is not None
    }  # fmt: skip
    bundle = reference_of(endpoint)
    if controls and bundle is None:
        raise ConfigurationError(
            "controls are judged against a reference, and none was named", "Name one with --reference"
        )
    plan = make_plan(endpoint, load_policy(endpoint.policy), bundle, level=level, fleet_size=fleet_size, seed=seed)
    key = key_for(endpoint.api_key_env, endpoint.origin)
    folder = RunFolder.create(out or new_run_folder(endpoint), plan)
    for kind, control in controls.items():
        key_for(control.api_key_env, control.origin)  # a missing key is said before anything is sent
        RunFolder.create(
            folder.path / "controls" / kind,
            make_plan(control, load_policy(endpoint.policy), bundle, level=level, fleet_size=fleet_size),
        )
    talk.print(
        f"auditing {endpoint.name}: at most {plan.estimate.requests} requests, run folder {folder.path}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    try:
        with progress_bar(endpoint.name) as onlooker:
            collect_run(folder, plan, endpoint, bundle, key, onlooker)
        collect_controls(folder, bundle)
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
