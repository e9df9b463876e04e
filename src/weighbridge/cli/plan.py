"""weighbridge plan."""

from typing import Any

import click

from weighbridge.cli.common import (
    collection_options,
    endpoint_from,
    endpoint_options,
    json_option,
    print_json,
    reference_of,
)
from weighbridge.cli.reference_licence import plain
from weighbridge.judge.library import build_library
from weighbridge.judge.policy import load_policy
from weighbridge.judge.power import Resolution, resolutions, text_resolutions
from weighbridge.judge.texts import build_text_library
from weighbridge.plan import make_plan
from weighbridge.records import LogprobLevel

TOP_LOGPROBS = 20
PLAN_DRAWS = 50  # the order of magnitude is wanted; `weighbridge power` draws more


@click.command("plan")
@endpoint_options
@collection_options
@json_option
def plan_command(seed: str | None, level: LogprobLevel, fleet_size: int, as_json: bool, **named: Any) -> int:
    """Say what an audit would send and cost at most; send nothing."""
    endpoint = endpoint_from(**named)
    bundle = reference_of(endpoint)
    plan = make_plan(endpoint, load_policy(endpoint.policy), bundle, level=level, fleet_size=fleet_size, seed=seed)
    estimate = plan.estimate
    told: list[Resolution] = []
    by_text: list[Resolution] = []
    if bundle is not None:
        texts = build_text_library(bundle, plan.policy)
        by_text = text_resolutions(texts, plan.policy, draws=PLAN_DRAWS) if texts is not None else []
        told = resolutions(build_library(bundle, plan.policy, TOP_LOGPROBS, level), plan.policy, draws=PLAN_DRAWS)
    if as_json:
        print_json({
            "schema": "weighbridge/plan-summary/1", "endpoint": endpoint.name, "policy": plan.policy.id,
            "reference": plan.reference.model_dump() if plan.reference else None, "seed": plan.draw.seed,
            "estimate": estimate.model_dump(), "level": plan.level, "fleet_size": plan.fleet_size,
            "departures": [r.model_dump() | {"resolvable": r.resolvable} for r in told],
            "departures_without_logprobs": [r.model_dump() | {"resolvable": r.resolvable} for r in by_text],
        })  # fmt: skip
        return 0
    click.echo(f"endpoint    {endpoint.name} ({endpoint.base_url}, model {endpoint.model})")
    click.echo(f"policy      {plan.policy.id}: {plan.policy.title}")
    click.echo(f"reference   {plan.reference.id if plan.reference else 'none: weights would not be judged'}")
    click.echo(f"requests    at most {estimate.requests}, retries included")
    always = (plan.route_requests, plan.capability_requests, plan.prompt_requests, plan.sampling_requests)
    asked = sum(len(requests) for requests in always)
    click.echo(
        f"            of these at most {asked} about the route, the prompt and sampling; the others until the weights are decided"
    )
    click.echo(f"tokens      at most about {estimate.prompt_tokens} in, {estimate.completion_tokens} out")
    click.echo(
        f"money       {f'at most about {estimate.cost_usd:.6f} USD' if estimate.cost_usd is not None else 'unknown'} ({estimate.price_source})"
    )
    click.echo(
        f"evidence    level {plan.level}; an endpoint is said to differ from e ≥ {plan.policy.differs_e_value:g}"
    )
    for line in _expected(told):
        click.echo(line)
    if by_text:
        click.echo("without     where no logprobs are returned, first tokens are compared as text (level L4):")
        for line in _expected(by_text, "requests"):
            click.echo(line)
        if plan.whole_requests:
            click.echo(
                f"            then up to {len(plan.whole_requests)} whole answers, as the limit allows: they tell whether something else answers some requests"
            )
    click.echo("An audit stops as soon as its question is answered, so it usually costs less.")
    return 0


def _expected(told: list[Resolution], unit: str = "answers") -> list[str]:
    """How many answers tell which departures, and which none tells."""
    if not told:
        return []
    slow = sorted((r for r in told if r.resolvable), key=lambda r: -(r.requests_p90 or 0))
    lines = [f"  told apart within {r.requests_p90} {unit} in nine draws of ten: {plain(r.variant)}" for r in slow[:3]]
    if len(slow) > len(lines):
        lines.append(f"  {len(slow) - len(lines)} more recorded departures within {slow[len(lines)].requests_p90}")
    lines += [f"  cannot be told from honest at this level: {plain(r.variant)}" for r in told if not r.resolvable]
    return lines
