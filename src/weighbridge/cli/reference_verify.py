"""weighbridge reference verify."""

from pathlib import Path
from typing import Any

import click
import numpy as np

from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.cli.reference_licence import plain
from weighbridge.cli.reference_sign import signature_line, trusted_key_option
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.lab.front import MODEL_NAME
from weighbridge.plan import pool_at_hand
from weighbridge.reference.bundle import LOCKS, Bundle, load_bundle, read_locks
from weighbridge.reference.noise import one_token_rows, with_noise
from weighbridge.reference.rerun import Rerun, open_original, rerun, stacks_to_run

NOISE_TOLERANCE = 1e-3  # relative: a manifest holds six digits, and numpy's releases sum in other orders


@click.command("verify")
@click.argument("bundle_name", metavar="BUNDLE")
@trusted_key_option
@click.option(
    "--rerun", "count", type=click.IntRange(0, 100_000), default=0, show_default=True,
    help="Run so many probes again on each stack of local weights (extra hf).",
)  # fmt: skip
@click.option("--stack", "only", metavar="ID", multiple=True, help="Run only this stack again; may be given again.")
@click.option("--weights", type=click.Path(path_type=Path), help="The folder of the original weights.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:0 or auto. Default: where each stack was recorded.")
@json_option
def verify_command(
    bundle_name: str, trusted_key_files: tuple[Path, ...], count: int, only: tuple[str, ...], weights: Path | None,
    device: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Check a bundle's hashes, pools and signature, and on wish its numbers.

    Exit codes: 0 whole, 1 whole but another run gives other numbers, 2 damaged or bad input, 3 signed by someone unknown.
    """
    bundle = load_bundle(bundle_name)
    check_noise(bundle)
    read_locks(bundle.manifest, [bundle.path / LOCKS])
    pools = [(pool_at_hand(bundle, pool), (bundle.path / "pools" / pool.id).is_dir()) for pool in bundle.manifest.pools]
    signature, line = signature_line(bundle.path, bundle.identity.digest, trusted_key_files)
    reruns = _reruns(bundle, count, only, weights, device) if count else []
    code = signature.exit_code if all(done.passed for done in reruns) else 1
    if as_json:
        document: dict[str, Any] = {
            "schema": "weighbridge/reference-verified/2", "id": bundle.manifest.id, "digest": bundle.identity.digest,
            "whole": True, "pools": [{**pool.identity.model_dump(), "carried": carried} for pool, carried in pools],
            "signature": {"state": signature.state, "signers": [k.name for k in signature.signers], "keyids": list(signature.keyids)},
            "rerun": [done.model_dump() for done in reruns],
        }  # fmt: skip
        print_json(document, ascii_only=True)
        return code
    click.echo(plain(f"{bundle.manifest.id}: {line}, digest {bundle.identity.digest}"))
    for done in reruns:
        click.echo(plain(rerun_line(done)))
    return code


def rerun_line(done: Rerun) -> str:
    """What running a stack again gave, in words."""
    found = (
        "values are missing"
        if done.largest_nats is None
        else f"at most {done.largest_nats:.2g} nats from what was recorded"
    )
    word = "as recorded" if done.passed else "NOT as recorded"
    return f"{done.stack}: {word}: {done.probes} probes, {found}, {done.allowed_nats:.2g} allowed ({done.basis})"


def check_noise(bundle: Bundle) -> None:
    """Check that the noise which a manifest states is that of its arrays.

    Raises
    ------
    BundleError
        Naming the first stack for which it is not.
    """
    manifest = bundle.manifest
    rows = one_token_rows(manifest.pools, bundle.row_probe)
    for stated, found in zip(
        manifest.stacks, with_noise(manifest.stacks, bundle.logprobs_nats, manifest.reference_stack, rows), strict=True
    ):
        same = (stated.noise_nats is None) == (found.noise_nats is None)
        if not same or not np.isclose(stated.noise_nats or 0.0, found.noise_nats or 0.0, rtol=NOISE_TOLERANCE, atol=0):
            raise BundleError(
                f"the noise of stack {stated.id} is not that of its logprobs",
                "Record the bundle again; do not use this copy",
            )


def _reruns(bundle: Bundle, count: int, only: tuple[str, ...], weights: Path | None, device: str | None) -> list[Rerun]:
    def say(line: str) -> None:
        talk.print(line, markup=False, highlight=False, soft_wrap=True)

    stacks = [stack for stack in stacks_to_run(bundle) if not only or stack.id in only]
    missing = set(only) - {stack.id for stack in stacks}
    if missing or not stacks:
        what = f"the stack {min(missing)}" if missing else f"the bundle {bundle.manifest.id}"
        raise ConfigurationError(
            f"{what} has no local weights to be run again",
            "Name a stack of the family transformers, or leave out --rerun",
        )
    if weights is None:
        if MODEL_NAME not in bundle.manifest.model_names:
            raise ConfigurationError(
                "running probes again needs the original weights", "Name their folder: --weights FOLDER"
            )
        weights = lab_checkpoint(say)
    checkpoint = open_original(weights, bundle.manifest.weights.files)
    return [rerun(bundle, stack, checkpoint, count, device, say) for stack in stacks]
