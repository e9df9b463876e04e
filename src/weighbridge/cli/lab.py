"""weighbridge lab."""

import threading

import click

from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.errors import ConfigurationError
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.lab.front import HONEST_TOP_LOGPROBS, MODEL_NAME, Lies
from weighbridge.lab.gemma import fetch_gemma
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import GEMMA, TORCH_VARIANTS, VARIANTS, TorchVariant, Variant

ENGINES: dict[str, dict[str, Variant] | dict[str, TorchVariant]] = {
    "llama.cpp": {**VARIANTS, GEMMA.name: GEMMA},
    "transformers": TORCH_VARIANTS,
}
DEFAULT_VARIANTS = {"llama.cpp": "f16", "transformers": "f32"}


def _say(line: str) -> None:
    talk.print(line, markup=False, highlight=False)


def _variant(engine: str, name: str) -> Variant | TorchVariant:
    variant = ENGINES[engine].get(name)
    if variant is None:
        raise ConfigurationError(
            f"the lab has no variant {name!r} for {engine}", f"Name one of {', '.join(ENGINES[engine])}"
        )
    return variant


@click.group("lab")
def lab_group() -> None:
    """A local provider that serves a real model and tells the truth, or one named lie."""


@lab_group.command("variants")
@json_option
def variants(as_json: bool) -> int:
    """List what the lab can serve."""
    if as_json:
        rows = [
            {"engine": engine, "name": v.name, "truth": v.truth, "departure": v.departure, "description": v.description}
            for engine, variants in ENGINES.items()
            for v in variants.values()
            if v is not GEMMA
        ]
        print_json({"schema": "weighbridge/lab-variants/1", "variants": rows})
    else:
        for engine, variants in ENGINES.items():
            for v in variants.values():
                click.echo(f"{engine:13} {v.name:22} {v.departure or 'honest':15} {v.description}")
    return 0


@lab_group.command("fetch")
@click.option("--accept-licence", is_flag=True, help="I have read Google's Gemma terms of use and accept them.")
def fetch(accept_licence: bool) -> int:
    """Fetch Gemma 3 270M, whose licence you must accept."""
    click.echo(str(fetch_gemma(accept_licence, _say)))
    return 0


@lab_group.command("folder")
def folder() -> int:
    """Print the folder of the lab's model in the Hugging Face layout, for other engines; made the first time."""
    click.echo(str(lab_checkpoint(_say)))
    return 0


@lab_group.command("serve")
@click.option(
    "--engine", type=click.Choice([*ENGINES]), default="llama.cpp", show_default=True, help="What runs the model."
)
@click.option(
    "--variant", "name", help="What to serve: one of the engine's variants.  [default: f16; transformers: f32]"
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
@click.option("--divert-to", help="Lie: another variant of the engine answers some requests.")
@click.option("--divert-share", type=click.FloatRange(0, 1), default=0.0, help="The share of requests that it answers.")
@click.option("--usage-offset", type=int, default=0, help="Lie: add this to the reported prompt tokens.")
def serve(
    engine: str, name: str | None, port: int, ignore_temperature: bool, logprobs_after_temperature: bool, max_top_logprobs: int, sentinels: bool,
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
    variant = _variant(engine, name or DEFAULT_VARIANTS[engine])
    diverted_to = _variant(engine, divert_to) if divert_to else None
    with lab_endpoint(variant, lies, _say, diverted_to=diverted_to, port=port) as front:
        click.echo(f"serving {variant.name} as {MODEL_NAME} at {front.base_url}")
        _say("stop with Ctrl-C")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            _say("stopped")
    return 0
