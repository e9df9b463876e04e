"""weighbridge pool."""

import json
import os
import re
import secrets
from pathlib import Path
from typing import get_args

import click

from weighbridge.canonical import write_atomically
from weighbridge.cli.common import json_option, print_json
from weighbridge.errors import ConfigurationError
from weighbridge.plan import pool_at_hand
from weighbridge.probes import Level, load_pool, write_pool
from weighbridge.probes.generate import Family, generate_probes
from weighbridge.reference.bundle import load_bundle
from weighbridge.reference.checkpoint import open_checkpoint
from weighbridge.reference.continuations import continue_greedily
from weighbridge.reference.local import LocalSetting, LocalWeights
from weighbridge.reference.select import select

_LEVEL_OF: dict[Family, Level] = {"chat": "L3", "short-answer": "L5", "long": "long"}


@click.group("pool")
def pool_group() -> None:
    """Make pools of probes: choose public ones from candidates, or generate sealed ones from a key."""


@pool_group.command("keygen")
@click.argument("key_file", metavar="KEYFILE", type=click.Path(path_type=Path))
def keygen(key_file: Path) -> int:
    """Write a fresh key of 256 bits for sealed pools; readable by you alone."""
    try:
        with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except OSError as error:
        raise ConfigurationError(f"{key_file} cannot be written ({error.strerror})", "Name a new file") from None
    click.echo(f"key written to {key_file}; whoever has it can foresee every text made from it")
    return 0


@pool_group.command("generate")
@click.option("--key-file", type=click.Path(path_type=Path), required=True, help="From `pool keygen`.")
@click.option("--family", type=click.Choice(get_args(Family)), default="chat", show_default=True)
@click.option("--count", type=click.IntRange(1, 100_000), required=True, help="How many probes.")
@click.option("--id", "pool_id", required=True, help="The new pool's name.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new pool's folder.")
@json_option
def generate(key_file: Path, family: Family, count: int, pool_id: str, out: Path, as_json: bool) -> int:
    """Generate a sealed pool; publish its commitment before it is used, and the texts after."""
    # Named after the pool, so that several sealed pools can stand in one bundle.
    probes = [
        probe.model_copy(update={"id": f"{pool_id}-{number:05d}"})
        for number, probe in enumerate(generate_probes(_key(key_file), count, family), start=1)
    ]
    pool = write_pool(out, pool_id, _LEVEL_OF[family], probes, visibility="sealed",
                      motivation="Texts made from a key that nobody else has, so that an endpoint cannot recognise them.")  # fmt: skip
    _done(pool.identity.id, pool.identity.sha256, len(probes), out, as_json)
    return 0


@pool_group.command("select")
@click.argument("candidates", metavar="BUNDLE")
@click.option("--level", type=click.Choice(["L3", "L4", "L5"]), required=True, help="What the probes are for.")
@click.option("--count", type=click.IntRange(1, 100_000), required=True, help="How many probes at most.")
@click.option("--id", "pool_id", required=True, help="The new pool's name.")
@click.option("--version", "version_number", type=click.IntRange(1), default=1, show_default=True)
@click.option("--sealed", is_flag=True, help="The candidates are a sealed pool's.")
@click.option("--exclude", multiple=True, metavar="POOL", help="Leave out the probes of this pool.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new pool's folder.")
@json_option
def select_command(
    candidates: str, level: Level, count: int, pool_id: str, version_number: int, sealed: bool, exclude: tuple[str, ...], out: Path, as_json: bool
) -> int:  # fmt: skip
    """Choose a pool's probes from a bundle of recorded candidates: most evidence per token, little likeness."""
    bundle = load_bundle(candidates)
    left_out = frozenset(probe.id for name in exclude for probe in load_pool(name).probes)
    selection = select(bundle, level, count, left_out)
    pools = [pool for pool in bundle.manifest.pools if pool.level == ("L5" if level == "L5" else "L3")]
    texts = {probe.id: probe for pool in pools for probe in pool_at_hand(bundle, pool).probes}
    pool = write_pool(
        out, pool_id, level, [texts[chosen.id] for chosen in selection.chosen], version=version_number,
        visibility="sealed" if sealed else "public", motivation=f"Chosen from {selection.candidates_considered} candidates: {selection.rule}.",
    )  # fmt: skip
    write_atomically(
        out / "selection.json", (json.dumps(selection.model_dump(mode="json", by_alias=True), indent=1) + "\n").encode()
    )
    _done(pool.identity.id, pool.identity.sha256, len(selection.chosen), out, as_json, selection.effective_sample_size)
    return 0


@pool_group.command("continue")
@click.argument("candidates", metavar="POOL")
@click.option(
    "--weights", type=click.Path(path_type=Path), required=True, help="The folder of the original weights (extra hf)."
)
@click.option("--tokens", type=click.IntRange(2, 512), default=24, show_default=True, help="Length of each answer.")
@click.option(
    "--every", type=click.IntRange(1, 512), default=3, show_default=True, help="Score every so many of its tokens."
)
@click.option("--count", type=click.IntRange(1, 100_000), required=True, help="How many probes at most.")
@click.option("--id", "pool_id", required=True, help="The new pool's name.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new pool's folder.")
@json_option
def continue_command(
    candidates: str, weights: Path, tokens: int, every: int, count: int, pool_id: str, out: Path, as_json: bool
) -> int:
    """Give candidates the reference's own likeliest answer: a pool for top-k logprobs on generated tokens."""
    probes = [p for p in load_pool(candidates).probes if p.messages[-1].role != "assistant"]
    checkpoint = open_checkpoint(weights, {})
    chosen = continue_greedily(LocalWeights(checkpoint, LocalSetting()), checkpoint, probes, tokens, count)
    pool = write_pool(
        out, pool_id, "L2", chosen, visibility="public", score_every=every,
        motivation=f"The reference's own likeliest answers of {tokens} tokens to {len(probes)} candidates; those where the likeliest token leads the next one by most.",
    )  # fmt: skip
    _done(pool.identity.id, pool.identity.sha256, len(pool.probes), out, as_json)
    return 0


def _key(path: Path) -> bytes:
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(
            f"the key file {path} cannot be read", "Make one with `weighbridge pool keygen`"
        ) from None
    if not re.fullmatch(r"(?:[0-9a-f]{2}){16,64}", text):
        raise ConfigurationError(f"{path} does not hold a key of at least 128 bits in hexadecimal digits", "Make one with `weighbridge pool keygen`")  # fmt: skip
    return bytes.fromhex(text)


def _done(pool_id: str, sha256: str, probes: int, out: Path, as_json: bool, effective: float | None = None) -> None:
    if as_json:
        print_json({
            "schema": "weighbridge/pool-made/1", "id": pool_id, "commitment_sha256": sha256, "probes": probes, "folder": str(out),
            "effective_sample_size": effective,
        })  # fmt: skip
        return
    worth = "" if effective is None else f", worth {effective:.0f} independent ones"
    click.echo(f"{pool_id}: {probes} probes{worth}, in {out}")
    click.echo(f"commitment (SHA-256 of all texts): {sha256}")
