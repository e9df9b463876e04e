"""weighbridge reference merge."""

from pathlib import Path

import click

from weighbridge.canonical import write_atomically
from weighbridge.cli.common import json_option, print_json
from weighbridge.errors import BundleError
from weighbridge.plan import pool_at_hand
from weighbridge.reference.build import write_bundle
from weighbridge.reference.bundle import LOCKS, load_bundle, read_locks
from weighbridge.reference.compare import add_pools, merge


@click.command("merge")
@click.argument("bundle_names", metavar="BUNDLE...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new bundle's folder.")
@json_option
def merge_command(bundle_names: tuple[str, ...], out: Path, as_json: bool) -> int:
    """Join the stacks of bundles that were built against the same reference.

    Or add to a bundle the pools of a part of a higher version; a pool that both hold is the part's.
    """
    if (out / "manifest.json").exists():
        raise BundleError(f"{out} already holds a bundle", "Choose another --out; a bundle is never overwritten")
    bundles = [load_bundle(name) for name in bundle_names]
    old, new = bundles[0].manifest, bundles[-1].manifest
    adds_pools = len(bundles) == 2 and new.pools != old.pools and new.version > old.version
    manifest, arrays, licence_text = add_pools(*bundles) if adds_pools else merge(bundles)
    for pool in manifest.pools:
        carrier = next((bundle for bundle in reversed(bundles) if (bundle.path / "pools" / pool.id).is_dir()), None)
        if carrier is not None:
            pool_at_hand(carrier, pool)
            for name in ("pool.toml", "probes.jsonl"):
                write_atomically(out / "pools" / pool.id / name, (carrier.path / "pools" / pool.id / name).read_bytes())
    for name, lock in read_locks(manifest, [bundle.path / LOCKS for bundle in bundles]).items():
        write_atomically(out / LOCKS / name, lock)
    write_bundle(out, manifest, arrays, licence_text)
    merged = load_bundle(str(out))
    stacks = [stack.id for stack in merged.manifest.stacks]
    if as_json:
        print_json({
            "schema": "weighbridge/reference-merged/1", "id": merged.manifest.id, "digest": merged.identity.digest,
            "folder": str(out), "stacks": stacks,
        })  # fmt: skip
    else:
        click.echo(
            f"{merged.manifest.id}: {len(stacks)} stacks of {len(bundles)} bundles, digest {merged.identity.digest}, in {out}"
        )
    return 0
