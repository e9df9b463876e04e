"""weighbridge doctor."""

import tempfile
from pathlib import Path
from typing import Any

import click

from weighbridge.audit import collect_run, judge_run
from weighbridge.cli.common import endpoint_from, endpoint_options, json_option, print_json
from weighbridge.judge.policy import load_policy
from weighbridge.keys import key_for
from weighbridge.plan import make_plan
from weighbridge.store import RunFolder


@click.command("doctor")
@endpoint_options
@json_option
def doctor_command(seed: str | None, as_json: bool, **named: Any) -> int:
    """Say what an endpoint exposes: at most four requests, nothing is judged or kept."""
    endpoint = endpoint_from(**named)
    plan = make_plan(endpoint, load_policy(endpoint.policy), None, seed=seed)
    key = key_for(endpoint.api_key_env, endpoint.origin)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder.create(Path(scratch) / "run", plan)
        collect_run(folder, plan, endpoint, None, key, lambda _: None)
        _, findings, verdict = judge_run(folder, None)
    capability = findings.capability
    if as_json:
        print_json(
            {
                "schema": "weighbridge/capability/1",
                "endpoint": endpoint.name,
                "requests": verdict.requests_sent,
                **capability.model_dump(),
            }
        )
    elif not capability.reachable:
        click.echo(verdict.sentence)
    else:
        click.echo(f"answers         yes, and names the model {capability.model_named!r}")
        click.echo(f"top logprobs    {capability.top_logprobs or 'none'}")
        click.echo(f"temperature     logprobs {capability.temperature_regime.replace('_', ' ')}")
        click.echo(f"token counts    {'reported' if capability.usage_reported else 'not reported'}")
        click.echo(f"fingerprint     {capability.fingerprint or 'none'}")
        click.echo(f"quirks          {', '.join(capability.quirks) or 'none'}")
    return 0 if capability.reachable else 4
