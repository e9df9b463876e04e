"""weighbridge resume."""

from pathlib import Path

import click

from weighbridge.audit import bundle_of, collect_run, exit_code
from weighbridge.cli.common import (
    collect_controls,
    fail_on_option,
    json_option,
    judge_and_report,
    progress_bar,
    show_run,
    talk,
)
from weighbridge.errors import RunFolderError
from weighbridge.keys import key_for
from weighbridge.records import Endpoint, checked
from weighbridge.store import RunFolder


@click.command("resume")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--base-url", help="The endpoint's base URL, given again; needed for a run that you did not start.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the key, given again.")
@click.option("--max-requests", type=int, help="Another limit on requests, those already sent included.")
@click.option("--max-cost", type=float, metavar="USD", help="Another limit on cost, what was spent included.")
@click.option("--reference", help="Where the reference bundle is now.")
@fail_on_option
@json_option
def resume_command(
    run: Path,
    base_url: str | None,
    api_key_env: str | None,
    max_requests: int | None,
    max_cost: float | None,
    reference: str | None,
    fail_on: str,
    as_json: bool,
) -> int:
    """Go on with an interrupted run; nothing that was answered is asked again."""
    folder = RunFolder(run)
    plan = folder.plan()
    endpoint = plan.endpoint
    if not folder.is_own() and base_url is None:
        raise RunFolderError(
            f"{run} was not started by you, or its plan was changed",
            "Check its endpoint and give it again with --base-url and, where it needs a key, --api-key-env",
        )
    if base_url is not None:
        # Given again: nothing of a stranger's file decides where the key goes.
        again = {"base_url": base_url, "api_key_env": api_key_env}
        endpoint = checked(Endpoint, endpoint.model_dump(by_alias=True) | again, "the command line")
    elif api_key_env is not None:
        endpoint = checked(
            Endpoint, endpoint.model_dump(by_alias=True) | {"api_key_env": api_key_env}, "the command line"
        )
    limits = {"max_requests": max_requests, "max_cost_usd": max_cost}
    changed = endpoint.limits.model_dump() | {name: value for name, value in limits.items() if value is not None}
    endpoint = checked(Endpoint, endpoint.model_dump(by_alias=True) | {"limits": changed}, "the command line")
    bundle = bundle_of(plan, reference)
    key = key_for(endpoint.api_key_env, endpoint.origin)
    try:
        with progress_bar(endpoint.name) as onlooker:
            collect_run(folder, plan, endpoint, bundle, key, onlooker)
        collect_controls(folder, bundle)
    except KeyboardInterrupt:
        talk.print(f"interrupted; go on with: weighbridge resume {run}", markup=False, highlight=False, soft_wrap=True)
        return 130
    judged = judge_and_report(folder, bundle)
    show_run(folder, *judged, as_json)
    return exit_code(judged[2], fail_on)
