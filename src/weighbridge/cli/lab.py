"""weighbridge lab."""

import dataclasses
import threading

import click
from pydantic import TypeAdapter, ValidationError

from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.errors import ConfigurationError
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.lab.front import MODEL_NAME
from weighbridge.lab.gemma import fetch_gemma
from weighbridge.lab.lies import Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import GEMMA, TORCH_VARIANTS, VARIANTS, TorchVariant, Variant

ENGINES: dict[str, dict[str, Variant] | dict[str, TorchVariant]] = {
    "llama.cpp": {**VARIANTS, GEMMA.name: GEMMA},
    "transformers": TORCH_VARIANTS,
}
DEFAULT_VARIANTS = {"llama.cpp": "f16", "transformers": "f32"}
_HONEST = {lie.name: lie.default for lie in dataclasses.fields(Lies)}
_LIES = f"NAME is one of {', '.join(_HONEST)}; request fields are given with commas between them."


def _say(line: str) -> None:
    talk.print(line, markup=False, highlight=False)


def _variant(engine: str, name: str) -> Variant | TorchVariant:
    variant = ENGINES[engine].get(name)
    if variant is None:
        raise ConfigurationError(
            f"the lab has no variant {name!r} for {engine}", f"Name one of {', '.join(ENGINES[engine])}"
        )
    return variant


def _llama_variant(name: str) -> Variant:
    variant = VARIANTS.get(name)
    if variant is None:
        raise ConfigurationError(f"llama.cpp has no variant {name!r} in the lab", f"Name one of {', '.join(VARIANTS)}")
    return variant


def _lies(told: tuple[str, ...]) -> Lies:
    """Read what ``--lie`` says; the types are those of the fields of `Lies`."""
    given: dict[str, object] = {}
    for lie in told:
        name, sign, value = lie.partition("=")
        if name not in _HONEST or not sign:
            raise ConfigurationError(f"--lie {lie} names no lie", f"Write NAME=VALUE. {_LIES}")
        if name in given:
            raise ConfigurationError(f"--lie {name} was given twice", "Give it once")
        given[name] = value.split(",") if isinstance(_HONEST[name], tuple) else value
    try:
        return TypeAdapter(Lies).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise ConfigurationError(f"--lie {name}={given[name]}: {first['msg']}", "Correct it and run again") from None


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
@click.option("--template", help="Serve these weights under the chat template of another of llama.cpp's variants.")
@click.option("--port", default=0, help="0 for any free port.")
@click.option("--divert-to", help="Lie: another variant of the engine answers some requests; see divert_share.")
@click.option("--forge-from", help="Lie: the logprobs are those of one of llama.cpp's variants.")
@click.option("--lie", "told", multiple=True, metavar="NAME=VALUE", help=f"Tell a lie; repeatable. {_LIES}")
def serve(
    engine: str, name: str | None, template: str | None, port: int, divert_to: str | None, forge_from: str | None, told: tuple[str, ...]
) -> int:  # fmt: skip
    """Serve one variant on this machine until interrupted.

    Lies that evade an audit: true_for_public=true has the true model answer the package's published probes, and
    true_first=N the first N requests of each key (and of those without one); cool=FACTOR multiplies the temperature
    that is asked; remember=true gives a request that comes again, whatever its seed, the same bytes again;
    max_top_logprobs=0 gives no logprobs, and refused=logprobs answers 400 where they are asked.
    """
    lies = _lies(told)
    variant = _variant(engine, name or DEFAULT_VARIANTS[engine])
    if template is not None:
        variant = dataclasses.replace(variant, template=_llama_variant(template).template)
    diverted_to = _variant(engine, divert_to) if divert_to else None
    forged_from = _llama_variant(forge_from) if forge_from else None
    with lab_endpoint(variant, lies, _say, diverted_to=diverted_to, forged_from=forged_from, port=port) as front:
        click.echo(f"serving {variant.name} as {MODEL_NAME} at {front.base_url}")
        _say("stop with Ctrl-C")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            _say("stopped")
    return 0
