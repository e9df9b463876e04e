"""weighbridge doctor."""

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weighbridge.audit import collect_run, judge_run
from weighbridge.cli.common import endpoint_from, endpoint_options, json_option, print_json, reference_of
from weighbridge.cli.reference_licence import plain
from weighbridge.judge.checks import prose
from weighbridge.judge.policy import load_policy
from weighbridge.keys import key_for
from weighbridge.plan import make_plan
from weighbridge.records import Capability, Finding
from weighbridge.report.html import MARKS
from weighbridge.store import RunFolder

MOST_REQUESTS = 40
# What a doctor does not look at: it sends none of the probes that these rest on.
NOT_ASKED = ("weights", "share")


@click.command("doctor")
@endpoint_options
@json_option
def doctor_command(seed: str | None, as_json: bool, **named: Any) -> int:
    """Say what an endpoint exposes, and what becomes of prompts and parameters: at most 40 requests, nothing is kept."""
    endpoint = endpoint_from(**named)
    endpoint = endpoint.model_copy(
        update={
            "limits": endpoint.limits.model_copy(
                update={"max_requests": min(MOST_REQUESTS, endpoint.limits.max_requests)}
            )
        }
    )
    bundle = reference_of(endpoint)
    plan = make_plan(endpoint, load_policy(endpoint.policy), bundle, seed=seed).model_copy(
        update={"probe_requests": [], "text_requests": [], "whole_requests": []}
    )
    key = key_for(endpoint.api_key_env, endpoint.origin)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder.create(Path(scratch) / "run", plan)
        collect_run(folder, plan, endpoint, bundle, key, lambda _: None)
        _, findings, verdict = judge_run(folder, bundle)
    capability = findings.capability
    shown = [f for f in findings.findings if f.check not in NOT_ASKED]
    if as_json:
        print_json(
            {
                "schema": "weighbridge/capability/2",
                "endpoint": endpoint.name,
                "requests": verdict.requests_sent,
                **capability.model_dump(),
                "findings": [finding.model_dump() for finding in shown],
            }
        )
    elif not capability.reachable:
        click.echo(verdict.sentence)
    else:
        _print(capability, shown, verdict.requests_sent)
    return 0 if capability.reachable else 4


def _print(capability: Capability, findings: list[Finding], requests: int) -> None:
    click.echo(f"answers         yes, and names the model {capability.model_named!r}")
    click.echo(f"top logprobs    {capability.top_logprobs or 'none'}")
    click.echo(f"temperature     logprobs {capability.temperature_regime.replace('_', ' ')}")
    click.echo(f"token counts    {'reported' if capability.usage_reported else 'not reported'}")
    click.echo(f"fingerprint     {capability.fingerprint or 'none'}")
    click.echo(f"quirks          {', '.join(capability.quirks) or 'none'}")
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        mark = f"{MARKS[finding.outcome]} {finding.outcome.replace('_', ' ')}"
        table.add_row(*(Text(plain(text)) for text in (prose()[finding.check].title, mark, finding.summary)))
    Console().print(table)
    click.echo(f"requests        {requests}")
