"""Running some of a bundle's probes again on the original weights, and how far the numbers are from the recorded ones."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.probes import draw
from weighbridge.records import Finite, Record, checked
from weighbridge.reference.bundle import Bundle, StackRecord
from weighbridge.reference.checkpoint import Checkpoint, open_checkpoint
from weighbridge.reference.engine import Prompt, Rows
from weighbridge.reference.local import LocalSetting, LocalWeights, in_batches, require_extra
from weighbridge.reference.paths import whole_rows

# float32 logprobs move by a few 1e-5 nats with the batch, the attention kernel and the processor (measured).
FLOAT32_NATS = 1e-4
# Two runs in 16 bits round in other places where batch, kernel or processor differ. The type's lattice is the measure:
# logits of 16 to 32 lie this far apart. Two runs of a 135M model were at most two steps apart; twice that is allowed.
# What rounds to 8 bits inside float32 counts as bfloat16, for a flipped rounding is as large.
LATTICE_NATS = {"bfloat16": 0.125, "float16": 0.015625}
LATTICE_STEPS = 4
_MACHINE = ("engine", "hardware", "threads")
_DEVICE = re.compile(r"cpu|auto|cuda(:\d{1,2})?")


class Rerun(Record):
    """What running a stack again gave."""

    stack: str
    probes: int
    largest_nats: Finite | None
    allowed_nats: Finite
    same_machine: bool
    basis: str
    passed: bool


def open_original(folder: Path, expected: dict[str, str]) -> Checkpoint:
    """Open a folder of weights and check that it holds the very files that a bundle names.

    Raises
    ------
    ConfigurationError
        If it is no model's folder.
    BundleError
        If a file is missing, has another hash, or is one that the bundle does not know.
    """
    checkpoint = open_checkpoint(folder, {})
    for name in sorted(expected.keys() | checkpoint.files.keys()):
        if expected.get(name) != checkpoint.files.get(name):
            what = "is missing" if name not in checkpoint.files else "is not the file that the bundle was recorded from"
            raise BundleError(
                f"{folder / name} {what}", "Name the folder of the weights that the manifest names by hash"
            )
    return checkpoint


def stacks_to_run(bundle: Bundle) -> list[StackRecord]:
    """Stacks of local weights."""
    return [
        s for s in bundle.manifest.stacks
        if s.engine_name == "transformers" and "sibling_files" not in s.engine
    ]  # fmt: skip


def rerun(
    bundle: Bundle,
    stack: StackRecord,
    checkpoint: Checkpoint,
    count: int,
    device: str | None,
    say: Callable[[str], None],
) -> Rerun:
    """Run a stack again on probes that the bundle's digest draws, in the batches in which one build of the whole bundle records them.

    Parameters
    ----------
    bundle : Bundle
    stack : StackRecord
        One of `stacks_to_run`.
    checkpoint : Checkpoint
        From `open_original`.
    count : int
        Probes to draw; what shared a batch with one of them is run and compared too.
    device : str or None
        Where to run; by default where it was recorded.
    say : callable
    """
    setting = setting_of(stack, device)
    say(f"running {stack.id} again")
    engine = LocalWeights(checkpoint, setting)
    facts = engine.facts()
    same_machine = all(facts.get(name) == stack.engine.get(name) for name in _MACHINE)
    recorded = bundle.logprobs_nats[bundle.stack_index[stack.id]]
    reference = bundle.logprobs_nats[bundle.stack_index[bundle.manifest.reference_stack]]
    unkept = whole_rows(bundle)[:, None] & np.isnan(reference)  # fewer tokens are kept of these
    drawn = set(draw([p.probe_id for p in _prompts(bundle, stack)], bundle.identity.digest)[:count])
    largest, probes = 0.0, 0
    for batch in _batches(_prompts(bundle, stack), bundle.manifest.shard, setting.batch):
        if not drawn & {prompt.probe_id for prompt in batch}:
            continue
        rows = [_rows(bundle, prompt) for prompt in batch]
        found = engine.score(batch, [bundle.token_ids[r] for r in rows], bundle.manifest.top_k)
        largest = max(largest, *(_largest(_kept(f, unkept[r]), recorded[r]) for f, r in zip(found, rows, strict=True)))
        if stack.id == bundle.manifest.reference_stack:  # its lists are the most likely tokens, none left out
            best = engine.score(batch, [None] * len(batch), bundle.manifest.top_k)
            largest = max(
                largest, *(_largest(_kept(f, unkept[r]), recorded[r]) for f, r in zip(best, rows, strict=True))
            )
        probes += len(batch)
    allowed, basis = allowance(setting)
    return Rerun(
        stack=stack.id, probes=probes, largest_nats=largest if np.isfinite(largest) else None, allowed_nats=allowed,
        same_machine=same_machine, basis=basis, passed=bool(largest <= allowed),
    )  # fmt: skip


def allowance(setting: LocalSetting) -> tuple[float, str]:
    """How far a value may be from the recorded one, in nats, and why.

    The same machine gives the same bits only in the same batches, and pools that were recorded later and merged were in batches of their own.
    """
    rounds = (setting.activations, setting.kv_cache, setting.module_outputs, setting.logits)
    if setting.dtype == "float32" and not any(rounds):
        return FLOAT32_NATS, "float32 arithmetic"
    kind = "float16" if setting.dtype == "float16" and not any(rounds) else "bfloat16"
    return LATTICE_STEPS * LATTICE_NATS[kind], f"{LATTICE_STEPS} steps of {kind} logits"


def setting_of(stack: StackRecord, device: str | None) -> LocalSetting:
    """The setting that a stack was recorded with; where a stranger's manifest asks too much, what this machine has."""
    facts: dict[str, Any] = {
        name: stack.engine[name] for name in LocalSetting.model_fields if stack.engine.get(name) is not None
    }
    threads = facts.get("threads")
    if not isinstance(threads, int) or threads > (os.cpu_count() or 1):
        facts.pop("threads", None)
    try:
        setting = checked(LocalSetting, facts, f"stack {stack.id}")
    except ConfigurationError as error:
        raise BundleError(error.what, "Do not use this bundle") from None
    setting = setting.model_copy(update={"device": device or setting.device})
    if not _DEVICE.fullmatch(setting.device) or (setting.device.startswith("cuda") and not _has_gpu()):
        raise ConfigurationError(
            f"the device {setting.device!r} of stack {stack.id} is not at hand", "Name another: --device cpu"
        )
    return setting


def _has_gpu() -> bool:
    require_extra()
    import torch

    return bool(torch.cuda.is_available())


def _prompts(bundle: Bundle, stack: StackRecord) -> list[Prompt]:
    """A stack's prompts in the order in which they were recorded."""
    asked = {i for pool in bundle.manifest.pools if pool.key in stack.pools for i in pool.probes}
    out = []
    for i in sorted(asked):
        ids = bundle.prompt_ids[bundle.prompt_offsets[i] : bundle.prompt_offsets[i + 1]]
        positions = bundle.row_position[bundle.row_probe == i]
        out.append(Prompt(bundle.manifest.probe_ids[i], tuple(ids.tolist()), tuple(positions.tolist())))
    return out


def _rows(bundle: Bundle, prompt: Prompt) -> NDArray[np.int64]:
    return np.flatnonzero(bundle.row_probe == bundle.probe_index[prompt.probe_id])


def _batches(prompts: list[Prompt], shard: int, batch: int) -> Iterator[list[Prompt]]:
    """The batches of a build: by shards, and in each of them as the engine forms them."""
    for start in range(0, len(prompts), shard):
        part = prompts[start : start + shard]
        for chosen in in_batches([len(prompt.token_ids) for prompt in part], batch):
            yield [part[i] for i in chosen]


def _kept(found: Rows, unkept: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(unkept, np.nan, found.logprobs_nats)


def _largest(found: NDArray[np.float32], recorded: NDArray[np.float32]) -> float:
    """The largest difference in nats; infinite where only one of them is a number."""
    if (np.isfinite(found) != np.isfinite(recorded)).any():
        return float("inf")
    difference = np.abs(found.astype(np.float64) - recorded)
    return float(np.nanmax(difference)) if np.isfinite(difference).any() else 0.0
