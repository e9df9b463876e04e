"""weighbridge lab."""

import threading

import click

from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.lab.front import HONEST_TOP_LOGPROBS, MODEL_NAME, Lies
from weighbridge.lab.gemma import fetch_gemma
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import GEMMA, VARIANTS


def _say(line: str) -> None:
    talk.print(line, markup=False, highlight=False)


@click.group("lab")
def lab_group() -> None:
    """A local provider that serves a real model and tells the truth, or one named lie."""


@lab_group.command("variants")
@json_option
def variants(as_json: bool) -> int:
    """List what the lab can serve."""
    if as_json:
        rows = [
            {"name": v.name, "truth": v.truth, "departure": v.departure, "description": v.description}
            for v in VARIANTS.values()
        ]
        print_json({"schema": "weighbridge/lab-variants/1", "variants": rows})
    else:
        for variant in (*VARIANTS.values(), GEMMA):
            click.echo(f"{variant.name:22} {variant.departure or 'honest':15} {variant.description}")
    return 0


@lab_group.command("fetch")
@click.option("--accept-licence", is_flag=True, help="I have read Google's Gemma terms of use and accept them.")
def fetch(accept_licence: bool) -> int:
    """Fetch Gemma 3 270M, whose licence you must accept."""
    click.echo(str(fetch_gemma(accept_licence, _say)))
    return 0


@lab_group.command("serve")
@click.option(
    "--variant",
    "name",
    default="f16",
    show_default=True,
    type=click.Choice([*VARIANTS, GEMMA.name]),
    help="What to serve.",
)
@click.option("--port", default=0, help="0 for any free port.")
@click.option("--ignore-temperature", is_flag=True, help="Lie: use temperature 1, whatever is asked.")
@click.option("--logprobs-after-temperature", is_flag=True, help="Report logprobs after dividing by the temperature.")
@click.option(
    "--max-top-logprobs",
    type=click.IntRange(0, HONEST_TOP_LOGPROBS),
    default=HONEST_TOP_LOGPROBS,
    show_default=True,
    help="Return at most so many; 0 for none.",
)
@click.option("--sentinels", is_flag=True, help="Lie: the second half of each list says -9999.")
@click.option("--divert-to", type=click.Choice([*VARIANTS]), help="Lie: another variant answers some requests.")
@click.option("--divert-share", type=click.FloatRange(0, 1), default=0.0, help="The share of requests that it answers.")
@click.option("--usage-offset", type=int, default=0, help="Lie: add this to the reported prompt tokens.")
def serve(
    name: str, port: int, ignore_temperature: bool, logprobs_after_temperature: bool, max_top_logprobs: int, sentinels: bool,
    divert_to: str | None, divert_share: float, usage_offset: int,
) -> int:  # fmt: skip
    """Serve one variant on this machine until interrupted."""
    lies = Lies(
        ignore_temperature=ignore_temperature,
        logprobs_after_temperature=logprobs_after_temperature,
        max_top_logprobs=max_top_logprobs,
        sentinels=sentinels,
        divert_share=divert_share,
        usage_offset=usage_offset,
    )
    variant = GEMMA if name == GEMMA.name else VARIANTS[name]
    with lab_endpoint(variant, lies, _say, diverted_to=VARIANTS[divert_to] if divert_to else None, port=port) as front:
        click.echo(f"serving {variant.name} as {MODEL_NAME} at {front.base_url}")
        _say("stop with Ctrl-C")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            _say("stopped")
    return 0
