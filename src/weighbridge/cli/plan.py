"""weighbridge plan."""

from typing import Any

import click

from weighbridge.cli.common import endpoint_from, endpoint_options, json_option, print_json, reference_of
from weighbridge.judge.policy import load_policy
from weighbridge.plan import make_plan


@click.command("plan")
@endpoint_options
@json_option
def plan_command(seed: str | None, as_json: bool, **named: Any) -> int:
    """Say what an audit would send and cost at most; send nothing."""
    endpoint = endpoint_from(**named)
    bundle = reference_of(endpoint)
    plan = make_plan(endpoint, load_policy(endpoint.policy), bundle, seed=seed)
    estimate = plan.estimate
    if as_json:
        print_json({
            "schema": "weighbridge/plan-summary/1", "endpoint": endpoint.name, "policy": plan.policy.id,
            "reference": plan.reference.model_dump() if plan.reference else None, "seed": plan.draw.seed,
            "estimate": estimate.model_dump(),
        })  # fmt: skip
        return 0
    click.echo(f"endpoint    {endpoint.name} ({endpoint.base_url}, model {endpoint.model})")
    click.echo(f"policy      {plan.policy.id}: {plan.policy.title}")
    click.echo(f"reference   {plan.reference.id if plan.reference else 'none: weights would not be judged'}")
    click.echo(f"requests    at most {estimate.requests}, retries included")
    click.echo(f"tokens      at most about {estimate.prompt_tokens} in, {estimate.completion_tokens} out")
    click.echo(
        f"money       {f'at most about {estimate.cost_usd:.6f} USD' if estimate.cost_usd is not None else 'unknown'} ({estimate.price_source})"
    )
    click.echo("An audit stops as soon as its question is answered, so it usually costs less.")
    return 0
