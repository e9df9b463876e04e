"""weighbridge reference show."""

import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weighbridge.cli.common import json_option, print_json
from weighbridge.cli.reference_licence import plain
from weighbridge.reference.bundle import Bundle, StackRecord, load_bundle, unfit_to_judge

WIDTH_ELSEWHERE = 200  # columns, where the output is no terminal
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@click.command("show")
@click.argument("bundle_name", metavar="BUNDLE")
@json_option
def show_command(bundle_name: str, as_json: bool) -> int:
    """Show a bundle's stacks and variants, and how far each is from the reference."""
    bundle = load_bundle(bundle_name)
    document = described(bundle)
    if as_json:
        print_json(document, ascii_only=True)
        return 0
    console = Console(width=None if sys.stdout.isatty() else WIDTH_ELSEWHERE)

    def line(text: str) -> None:
        console.print(Text(plain(text)), soft_wrap=True)

    manifest, licence = bundle.manifest, bundle.manifest.licence
    line(f"{manifest.id} version {manifest.version}, digest {bundle.identity.digest}")
    line(f"{manifest.model}: {manifest.weights.source}, {manifest.weights.precision}; kept by {manifest.keeper}")
    console.print(_table(bundle))
    line(
        f"honest stacks: {len(document['stacks'])}, of families: {len(document['families'])}; "
        f"variants counted: {len(document['variants_counted'])}"
    )
    if document["incomplete"] is not None:
        line(f"nothing can be judged against this bundle alone: {document['incomplete']}")
    for pool in document["pools"]:
        line(
            f"pool {pool['key']} version {pool['version']} ({pool['level']}): {pool['probes']} probes, {pool['prompt_tokens']} prompt tokens"
        )
    line("no licence text" if licence is None else f"licence: {licence.identifier}, from {licence.source}")
    for ask in licence.asks if licence is not None else []:
        line(f"  {ask.kind} ({ask.place}): {ask.quote}")
    return 0


def described(bundle: Bundle) -> dict[str, Any]:
    """What `--json` prints."""
    manifest = bundle.manifest
    tokens = bundle.prompt_tokens[0]
    honest = [s for s in manifest.stacks if s.departure is None]
    departures = [s for s in manifest.stacks if s.departure is not None]
    return {
        "schema": "weighbridge/reference-show/2", "id": manifest.id, "version": manifest.version,
        "digest": bundle.identity.digest, "model": manifest.model, "model_names": manifest.model_names,
        "keeper": manifest.keeper, "built_with": manifest.built_with, "weights": manifest.weights.model_dump(),
        "licence": manifest.licence.model_dump() if manifest.licence is not None else None,
        "pools": [
            pool.model_dump() | {"key": pool.key, "probes": len(pool.probes), "prompt_tokens": int(tokens[pool.probes].sum())}
            for pool in manifest.pools
        ],
        "usable_probes": len(bundle.usable_probe_ids), "top_k": manifest.top_k, "reference_stack": manifest.reference_stack,
        "stacks": [s.model_dump() for s in honest], "variants": [s.model_dump() for s in departures],
        "variants_counted": sorted({s.variant or s.id for s in departures if not s.indistinguishable}),
        "families": sorted({s.family for s in honest}), "hypotheses": [h.model_dump() for h in manifest.hypotheses],
        "incomplete": unfit_to_judge(bundle),
    }  # fmt: skip


def _table(bundle: Bundle) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("stack", "kind", "family", "noise, nats", "bits held", "precision", "description"):
        table.add_column(heading, overflow="fold")
    for stack in bundle.manifest.stacks:
        kind: str = stack.departure or ("reference" if stack.id == bundle.manifest.reference_stack else "honest")
        if stack.indistinguishable:
            kind += ", indistinguishable: not counted"
        cells = (
            stack.id, kind, stack.family, "" if stack.noise_nats is None else f"{stack.noise_nats:.4f}",
            "" if stack.bits_held is None else f"{stack.bits_held:g}", short_precision(stack), stack.description,
        )  # fmt: skip
        table.add_row(*(Text(plain(cell)) for cell in cells))
    return table


def short_precision(stack: StackRecord) -> str:
    """Weights, activations, KV cache and logits, in short; once where all are the same."""
    kept = stack.precision
    words = [_SHORT.get(w, w) for w in (kept.weights, kept.activations, kept.kv_cache, kept.logits)]
    return words[0] if len(set(words)) == 1 else "/".join(words)
