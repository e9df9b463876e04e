"""weighbridge power."""

import sys
from typing import get_args

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.cli.reference_licence import plain
from weighbridge.errors import ConfigurationError
from weighbridge.judge.library import build_library
from weighbridge.judge.policy import load_policy
from weighbridge.judge.power import DRAWS, TEXT_LEVEL, Diversion, Resolution, diversions, resolutions, text_resolutions
from weighbridge.judge.texts import build_text_library
from weighbridge.judge.whole import build_whole_library
from weighbridge.records import LogprobLevel, Policy, Price
from weighbridge.reference.bundle import Bundle, load_bundle, unfit_to_judge

TOP_LOGPROBS = 20
WIDTH_ELSEWHERE = 160  # columns, where the output is no terminal


@click.command("power")
@click.option("--reference", required=True, help="A reference bundle: its folder, or the name of an embedded one.")
@click.option("--policy", "policy_name", default="strict", show_default=True, help="What counts as honest.")
@click.option(
    "--top-logprobs",
    type=click.IntRange(5, 20),
    default=TOP_LOGPROBS,
    show_default=True,
    help="How many an endpoint returns.",
)
@click.option("--price", type=(float, float), metavar="IN OUT", help="US dollars for a million tokens in and out.")
@click.option(
    "--draws",
    type=click.IntRange(20, 5000),
    default=DRAWS,
    show_default=True,
    help="Audits drawn for each departure and engine.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the draws.")
@json_option
def power_command(
    reference: str,
    policy_name: str,
    top_logprobs: int,
    price: tuple[float, float] | None,
    draws: int,
    seed: int,
    as_json: bool,
) -> int:
    """Say what it takes to tell each recorded departure from honest, from a bundle alone; send nothing."""
    bundle, policy = load_bundle(reference), load_policy(policy_name)
    rates = None
    if price is not None:
        if min(price) < 0:
            raise ConfigurationError("--price is negative", "Give the endpoint's prices")
        rates = Price(prompt_usd_per_million_tokens=price[0], completion_usd_per_million_tokens=price[1])
    levels = [level for level in get_args(LogprobLevel) if unfit_to_judge(bundle, level) is None]
    found: list[Resolution] = []
    for level in levels:
        talk.print(f"drawing audits at level {level}", markup=False, highlight=False)
        library = build_library(bundle, policy, top_logprobs, level)
        found += [_priced(r, rates) for r in resolutions(library, policy, draws=draws, seed=seed)]
    texts = build_text_library(bundle, policy)
    if texts is not None:
        talk.print(f"drawing audits at level {TEXT_LEVEL}", markup=False, highlight=False)
        found += [_priced(r, rates) for r in text_resolutions(texts, policy, draws=draws, seed=seed)]
    whole = build_whole_library(bundle, policy)
    diverted = diversions(whole, policy, draws=draws, seed=seed) if whole is not None else []
    if as_json:
        print_json({
            "schema": "weighbridge/power/1", "reference": bundle.identity.model_dump(), "policy": policy.id, "differs_e_value": policy.differs_e_value,
            "top_logprobs": top_logprobs, "draws": draws, "seed": seed, "levels": [*levels, *([TEXT_LEVEL] if texts is not None else [])],
            "departures": [r.model_dump() | {"resolvable": r.resolvable} for r in found], "diverted": [d.model_dump() for d in diverted],
        }, ascii_only=True)  # fmt: skip
        return 0
    _show(bundle, policy, found, draws)
    if diverted:
        _show_diverted(diverted)
    return 0


def _priced(found: Resolution, rates: Price | None) -> Resolution:
    if rates is None or found.prompt_tokens is None or found.completion_tokens is None:
        return found
    return found.model_copy(update={"cost_usd": rates.cost_usd(found.prompt_tokens, found.completion_tokens)})


def _show(bundle: Bundle, policy: Policy, found: list[Resolution], draws: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH_ELSEWHERE)
    console.print(
        Text(plain(f"{bundle.manifest.id}, policy {policy.id}: answers until e ≥ {policy.differs_e_value:g}, median and 90 % of {draws} draws on the engine where it takes longest"))
    )  # fmt: skip
    for level in dict.fromkeys(r.level for r in found):
        table = Table(
            box=None,
            padding=(0, 2, 0, 0),
            title=f"level {level}" + (", no logprobs" if level == TEXT_LEVEL else ""),
            title_justify="left",
        )
        table.add_column("departure")
        for heading in ("bits held", "noise, nats", "median", "90 %", "tokens in", "tokens out", "USD"):
            table.add_column(heading, justify="right")
        table.add_column("where it takes longest")
        for r in (r for r in found if r.level == level):
            told = r.resolvable
            cells = (
                r.variant, "" if r.bits_held is None else f"{r.bits_held:g}", f"{r.noise_nats:.3f}",
                _number(r.requests_median) if told else "not resolvable", _number(r.requests_p90) if told else "",
                _number(r.prompt_tokens) if told else "", _number(r.completion_tokens) if told else "", "" if r.cost_usd is None or not told else f"{r.cost_usd:.6f}", r.served_on,
            )  # fmt: skip
            table.add_row(*(Text(plain(cell)) for cell in cells))
        console.print(table)
    console.print(
        "Tokens and money are those of the median audit, without the calls that ask what an endpoint exposes."
    )


def _show_diverted(diverted: list[Diversion]) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH_ELSEWHERE)
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        title=f"{diverted[0].share:.0%} of the requests go elsewhere: whole answers as text, no logprobs",
        title_justify="left",
    )
    table.add_column("answered by")
    for heading in ("its answers that stand out", "found within the pool", "median", "90 %"):
        table.add_column(heading, justify="right")
    for d in diverted:
        cells = (d.departure, f"{d.stand_out_share:.0%}", f"{d.reached_share:.0%}", _number(d.answers_median), _number(d.answers_p90))  # fmt: skip
        table.add_row(*(Text(plain(cell)) for cell in cells))
    console.print(table)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
