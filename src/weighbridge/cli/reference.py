"""weighbridge reference."""

from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.judge.library import build_library
from weighbridge.judge.policy import load_policy
from weighbridge.plan import pool_of
from weighbridge.records import read_toml
from weighbridge.reference.build import Spec, build_bundle
from weighbridge.reference.bundle import load_bundle


@click.group("reference")
def reference_group() -> None:
    """Build, show and verify reference bundles."""


@reference_group.command("build")
@click.argument("spec_file", metavar="SPEC.toml", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new bundle's folder.")
@json_option
def build(spec_file: Path, out: Path, as_json: bool) -> int:
    """Record a bundle; run again after an interruption, it goes on where it stopped."""
    spec = read_toml(Spec, spec_file)

    def say(line: str) -> None:
        talk.print(line, markup=False, highlight=False)

    def step(stack: str, done: int, total: int) -> None:
        if done == total or done % 50 == 0:
            say(f"  {stack}: {done} of {total} probes")

    build_bundle(spec, out, say, step)
    bundle = load_bundle(str(out))
    if as_json:
        print_json(
            {
                "schema": "weighbridge/reference-built/1",
                "id": bundle.manifest.id,
                "digest": bundle.identity.digest,
                "folder": str(out),
            }
        )
    else:
        click.echo(f"{bundle.manifest.id}: digest {bundle.identity.digest}, in {out}")
    return 0


@reference_group.command("show")
@click.argument("bundle_name", metavar="BUNDLE")
@json_option
def show(bundle_name: str, as_json: bool) -> int:
    """Show a bundle's stacks and variants, and how far each is from the reference."""
    bundle = load_bundle(bundle_name)
    manifest = bundle.manifest
    library = build_library(bundle, load_policy("strict"), 20)
    scales = {
        s.id: float(np.exp(np.nanmean(row))) for s, row in zip(library.honest, library.honest_log_scales, strict=True)
    }
    scales |= {
        s.id: float(np.exp(np.nanmean(row)))
        for s, row in zip(library.variants, library.variant_log_scales, strict=True)
    }
    rows = [{**stack.model_dump(), "noise_nats": scales.get(stack.id, 0.0)} for stack in manifest.stacks]
    if as_json:
        print_json({
            "schema": "weighbridge/reference-show/1", "id": manifest.id, "version": manifest.version, "digest": bundle.identity.digest,
            "model": manifest.model, "weights": manifest.weights.model_dump(), "pool": manifest.pool.model_dump(),
            "probes": len(manifest.probe_ids), "usable_probes": len(bundle.usable_probe_ids),
            "mean_prompt_tokens": float(bundle.prompt_tokens[0].mean()), "reference_stack": manifest.reference_stack,
            "stacks": [r for r in rows if r["departure"] is None], "variants": [r for r in rows if r["departure"] is not None],
            "hypotheses": [h.model_dump() for h in manifest.hypotheses],
        })  # fmt: skip
        return 0
    console = Console()
    console.print(
        f"{manifest.id} version {manifest.version}, digest {bundle.identity.digest}", markup=False, highlight=False
    )
    console.print(
        f"{manifest.model}: {manifest.weights.source} ({manifest.weights.licence})", markup=False, highlight=False
    )
    console.print(
        f"{len(manifest.probe_ids)} probes of {manifest.pool.id} version {manifest.pool.version}, mean {bundle.prompt_tokens[0].mean():.0f} prompt tokens",
        markup=False,
        highlight=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("stack", "kind", "noise, nats", "bits held", "description"):
        table.add_column(heading)
    for stack in manifest.stacks:
        kind = (
            "reference"
            if stack.id == manifest.reference_stack
            else "honest"
            if stack.departure is None
            else stack.departure
        )
        noise = f"{scales[stack.id]:.4f}" if stack.id in scales else ""
        table.add_row(
            stack.id, kind, noise, "" if stack.bits_held is None else f"{stack.bits_held:g}", stack.description
        )
    console.print(table, markup=False)
    return 0


@reference_group.command("verify")
@click.argument("bundle_name", metavar="BUNDLE")
@json_option
def verify(bundle_name: str, as_json: bool) -> int:
    """Check a bundle's hashes, shapes and pool."""
    bundle = load_bundle(bundle_name)
    pool_of(bundle)
    if as_json:
        print_json(
            {
                "schema": "weighbridge/reference-verified/1",
                "id": bundle.manifest.id,
                "digest": bundle.identity.digest,
                "whole": True,
            }
        )
    else:
        click.echo(f"{bundle.manifest.id}: whole, digest {bundle.identity.digest}")
    return 0
