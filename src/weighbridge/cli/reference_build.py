"""weighbridge reference build."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.records import read_toml
from weighbridge.reference.build import Step, build_bundle, open_pool
from weighbridge.reference.bundle import load_bundle, unfit_to_judge
from weighbridge.reference.spec import Spec

LINES_EVERY_PROBES = 50


@click.command("build")
@click.argument("spec_file", metavar="SPEC.toml", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new bundle's folder.")
@click.option(
    "--reference-from", metavar="BUNDLE", help="Take the reference stack from this bundle, so that both can be merged."
)
@json_option
def build_command(spec_file: Path, out: Path, reference_from: str | None, as_json: bool) -> int:
    """Record a bundle; run again after an interruption, it goes on where it stopped."""
    spec = read_toml(Spec, spec_file)
    known = load_bundle(reference_from) if reference_from is not None else None
    work = planned(spec, spec_file.parent, out, with_reference=known is None)
    for line in plan_lines(spec, out, work):
        say(line)
    with progress(work) as step:
        build_bundle(spec, spec_file.parent, out, say, step, reference_from=known)
    bundle = load_bundle(str(out))
    manifest = bundle.manifest
    missing = unfit_to_judge(bundle)
    if missing is not None:
        say(f"nothing can be judged against this bundle alone: {missing}; merge it with one that has it")
    if as_json:
        print_json({"schema": "weighbridge/reference-built/1", "id": manifest.id, "digest": bundle.identity.digest, "folder": str(out)})  # fmt: skip
    else:
        click.echo(f"{manifest.id}: digest {bundle.identity.digest}, in {out}")
    return 0


def say(line: str) -> None:
    """A line on stderr."""
    talk.print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class StackWork:
    """What is to be done for one stack, and what of it is on the disk."""

    id: str
    honest: bool
    probes: int
    shards: int
    shards_done: int
    shard: int

    @property
    def probes_done(self) -> int:
        """Probes whose shards are on the disk."""
        return min(self.probes, self.shards_done * self.shard)


def planned(spec: Spec, spec_folder: Path, out: Path, *, with_reference: bool) -> list[StackWork]:
    """The work of each stack that is going to run."""
    sizes = {pool.name: len(open_pool(pool.name, spec_folder).probes) for pool in spec.pool}
    partial = out.with_name(out.name + ".partial")
    work = []
    for stack in spec.stack if with_reference else spec.stack[1:]:
        probes = sum(
            min(pool.first or sizes[pool.name], sizes[pool.name]) * len(pool.renderings)
            for pool in spec.pool if pool.only_on is None or stack.id in pool.only_on
        )  # fmt: skip
        shards, on_disk = -(-probes // spec.shard), len(list((partial / stack.id).glob("[0-9]*.npz")))
        work.append(StackWork(stack.id, stack.departs is None, probes, shards, min(shards, on_disk), spec.shard))
    return work


def plan_lines(spec: Spec, out: Path, work: list[StackWork]) -> list[str]:
    """The plan in words."""
    honest, stacks = sum(stack.honest for stack in work), len(work)
    lines = [
        f"{spec.id} version {spec.version}: stacks to run: {stacks} (honest: {honest}, departures: {stacks - honest}), into {out}"
    ]
    width = max((len(stack.id) for stack in work), default=0)
    for stack in work:
        shards = f"{stack.shards_done} of {stack.shards} shards on disk"
        lines.append(
            f"  {stack.id:{width}}  {'honest' if stack.honest else 'departure':9}  {stack.probes} probes, {shards}"
        )
    return lines


@contextmanager
def progress(work: list[StackWork]) -> Iterator[Step]:
    """Show progress on stderr, a shard at a time: a moving bar in a terminal, a line now and then elsewhere."""
    done = {stack.id: stack.probes_done for stack in work}
    total, before, started = sum(stack.probes for stack in work), sum(done.values()), time.perf_counter()

    def state(stack: str, probes: int, of: int) -> str:
        done[stack] = probes
        rate = (sum(done.values()) - before) / max(time.perf_counter() - started, 1e-9)
        left = (
            f", about {span((total - sum(done.values())) / rate)} left in all"
            if rate > 0 and sum(done.values()) < total
            else ""
        )
        return f"{stack}: {probes} of {of} probes, {rate:.2g} a second{left}"

    if not sys.stderr.isatty():
        said: dict[str, int] = {}

        def tell(stack: str, probes: int, of: int) -> None:
            line = state(stack, probes, of)
            if probes == of or probes - said.get(stack, 0) >= LINES_EVERY_PROBES:
                said[stack] = probes
                say(f"  {line}")

        yield tell
        return
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=talk, transient=True) as bar:
        task = bar.add_task("", total=total, completed=before)

        def show(stack: str, probes: int, of: int) -> None:
            line = state(stack, probes, of)
            bar.update(task, description=line, completed=sum(done.values()))

        yield show


def span(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
