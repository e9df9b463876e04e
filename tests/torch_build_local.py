"""Building a bundle with the local-weights engine: killed and resumed, damaged and repaired, split and merged."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from weighbridge.canonical import sha256_hex
from weighbridge.errors import BundleError, ConfigurationError, WeighbridgeError
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.probes import load_pool, write_pool
from weighbridge.records import Message, Probe, checked
from weighbridge.reference.build import _read_shard, build_bundle
from weighbridge.reference.bundle import Bundle, Manifest, load_bundle
from weighbridge.reference.compare import merge
from weighbridge.reference.select import select
from weighbridge.reference.spec import Spec
from weighbridge.stats.residuals import centred_difference, log_scale, own_top

SEED = 20261122
KILLS = 4
EVERY = 8  # of a forced text's tokens
ANSWER = (
    "Warm the pot first by rinsing it with hot water. Then add one teaspoon of loose tea for each cup, "
    "and one more for the pot. Pour the water over the leaves as soon as it boils."
)
FLOAT32 = {"id": "hf-float32", "description": "the reference", "local": {"batch": 4}}
BFLOAT16 = {"id": "hf-bfloat16", "description": "bfloat16", "local": {"dtype": "bfloat16", "batch": 4}}
INT8 = {
    "id": "int8", "description": "int8", "departure": "precision", "departure_class": "int8", "local": {"weights": "int8", "batch": 4},
}  # fmt: skip
INT4 = {
    "id": "int4", "description": "int4", "departure": "precision", "departure_class": "int4", "local": {"weights": "int4-g64", "batch": 4},
}  # fmt: skip
STACKS = [FLOAT32, BFLOAT16, INT8, INT4]
OTHER_TEMPLATE = "no-default-system"
RENDERED = 4  # probes that are recorded under the other template as well, and on which stacks
RENDERED_ON = ("hf-float32", "int8")
SHARDS = 2 * 3 + 2 * 4  # of 11 + 1 probes, four at a time, and the rendered ones after them

_BUILD = """
import json, sys
from pathlib import Path
from weighbridge.reference.build import build_bundle
from weighbridge.reference.spec import Spec

spec = Spec.model_validate(json.loads(Path(sys.argv[1]).read_text()))
build_bundle(spec, Path(sys.argv[1]).parent, Path(sys.argv[2]), print, lambda *_: None)
"""


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pools, 12 probes together: 11 of one token, and one forced text."""
    folder = tmp_path_factory.mktemp("workshop")
    shortest = sorted(load_pool("chat-one-token").probes, key=lambda probe: len(probe.messages[0].content))[:11]
    # One has a system message of its own, which no template replaces; it stands first.
    shortest.sort(key=lambda probe: probe.messages[0].role)
    assert [probe.messages[0].role for probe in shortest[:2]] == ["system", "user"]
    write_pool(folder / "few", "few", "L3", shortest, visibility="public", motivation="a test")
    forced = Probe(
        id="forced-tea", purpose="a forced text",
        messages=[Message(role="user", content="How do I make tea?"), Message(role="assistant", content=ANSWER)],
    )  # fmt: skip
    write_pool(folder / "forced", "forced", "L1", [forced], visibility="public", motivation="a test")
    with (folder / "forced" / "pool.toml").open("a") as file:
        file.write(f"score_every = {EVERY}\n")
    return folder


def spec_of(stacks: list[dict[str, Any]], **changes: Any) -> Spec:
    pools: list[dict[str, Any]] = [{"name": "few"}, {"name": "forced"}]
    rendered_on = [stack["id"] for stack in stacks if stack["id"] in RENDERED_ON]
    pools.append({"name": "few", "renderings": [OTHER_TEMPLATE], "first": RENDERED, "only_on": rendered_on})
    document = {
        "schema": "weighbridge/reference-spec/3", "id": "small", "version": 1, "model": "SmolLM2-135M-Instruct", "model_names": [],
        "keeper": "a test", "top_k": 40, "shard": 4, "weights": {"source": "the lab", "precision": "bfloat16", "lab": True},
        "pool": pools, "stack": stacks,
        "hypothesis": [{"id": OTHER_TEMPLATE, "cause": "template", "lab_variant": OTHER_TEMPLATE}],
    }  # fmt: skip
    return checked(Spec, document | changes, "a test's spec")


def build(
    workshop: Path, out: Path, stacks: list[dict[str, Any]], base: Bundle | None = None, **changes: Any
) -> Bundle:
    build_bundle(spec_of(stacks, **changes), workshop, out, quiet, quiet, reference_from=base)
    return load_bundle(str(out))


@pytest.fixture(scope="module")
def whole(workshop: Path) -> Bundle:
    """The bundle of a build that nothing disturbed; what it had recorded before it was put together is kept aside."""

    def step(stack: str, done: int, count: int) -> None:
        if stack == STACKS[-1]["id"] and done == count:
            shutil.copytree(workshop / "whole.partial", workshop / "recorded")

    build_bundle(spec_of(STACKS), workshop, workshop / "whole", quiet, step)
    return load_bundle(str(workshop / "whole"))


@pytest.fixture(scope="module")
def compared(workshop: Path, whole: Bundle) -> Bundle:
    """The same reference, a server of another engine, and two variants."""
    return build(workshop, workshop / "compared", [FLOAT32, {"id": "lab-f16", "lab_variant": "f16"}, INT8, INT4], whole)


@pytest.fixture
def half_built(workshop: Path, whole: Bundle, tmp_path: Path) -> Path:
    """The place of a build that stopped when all shards were there."""
    shutil.copytree(workshop / "recorded", tmp_path / "out.partial")
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_line(error: pytest.ExceptionInfo[WeighbridgeError]) -> str:
    said = str(error.value)
    assert said.isprintable()
    assert error.value.next_step
    return said


# -- killed and resumed ----------------------------------------------------------------------------------------------


def test_a_build_that_was_killed_four_times_ends_with_the_same_bytes(
    workshop: Path, whole: Bundle, tmp_path: Path
) -> None:
    """Each time after a number of shards, and a while, that a seed gives."""
    chance = random.Random(SEED)
    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    spec_file = workshop / "spec.json"
    spec_file.write_text(spec_of(STACKS).model_dump_json(by_alias=True, exclude_none=True))
    command = [sys.executable, "-c", _BUILD, str(spec_file), str(out)]

    def shards() -> int:
        return len(list(partial.rglob("*.npz")))

    seen = []
    for count in sorted(chance.sample(range(SHARDS - 2), KILLS)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        while shards() < count or not (partial / "build.sha256").exists():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()[-2000:]
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert process.stderr is not None
        process.stderr.close()
        seen.append(shards())
        assert not (out / "manifest.json").exists()
    print(f"killed with {seen} of {SHARDS} shards written")  # noqa: T201
    assert len(set(seen)) >= 3
    assert seen[-1] < SHARDS
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name in ("manifest.json", "arrays.npz"):
        assert (out / name).read_bytes() == (whole.path / name).read_bytes()
    # What stood before a kill was not computed again.
    log = [json.loads(line) for line in (out / "build-log.jsonl").read_text().splitlines()]
    assert len({(line["stack"], line["shard"]) for line in log}) == len(log) == SHARDS


def test_a_damaged_shard_is_computed_again(workshop: Path, whole: Bundle, half_built: Path) -> None:
    partial = half_built.with_name("out.partial")
    shard = partial / "hf-bfloat16" / "00001.npz"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    flipped = bytearray((partial / "hf-float32" / "00002.npz").read_bytes())
    flipped[len(flipped) // 2] ^= 0x10
    (partial / "hf-float32" / "00002.npz").write_bytes(flipped)
    build_bundle(spec_of(STACKS), workshop, half_built, quiet, quiet)
    for name in ("manifest.json", "arrays.npz"):
        assert (half_built / name).read_bytes() == (whole.path / name).read_bytes()
    log = [json.loads(line) for line in (half_built / "build-log.jsonl").read_text().splitlines()]
    assert [(line["stack"], line["shard"]) for line in log[SHARDS:]] == [("hf-float32", 2), ("hf-bfloat16", 1)]


def test_no_damage_of_a_shard_is_read_as_numbers(workshop: Path, whole: Bundle, tmp_path: Path) -> None:
    good = (workshop / "recorded" / "int8" / "00000.npz").read_bytes()
    chance, path = random.Random(SEED), tmp_path / "shard.npz"
    path.write_bytes(good)
    with np.load(path) as shard:
        rows = shard["rows"].tolist()
    known = _read_shard(path, rows)
    assert known is not None
    refused = 0
    header = list(range(400)) + list(range(len(good) - 400, len(good)))
    for at in header + chance.choices(range(len(good)), k=100):
        damaged = bytearray(good)
        damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        found = _read_shard(path, rows)
        if found is None:
            refused += 1
        else:  # a byte that says nothing, such as a date
            assert found.rows == known.rows
            assert np.array_equal(found.token_ids, known.token_ids)
            assert np.array_equal(found.logprobs_nats, known.logprobs_nats, equal_nan=True)
    assert refused > 400


@pytest.mark.parametrize("what", ["spec", "pool", "weights"])
def test_another_build_is_refused_and_nothing_recorded_is_lost(
    what: str, workshop: Path, whole: Bundle, half_built: Path, tmp_path: Path
) -> None:
    partial = half_built.with_name("out.partial")
    recorded = contents(partial)
    spec, folder = spec_of(STACKS), workshop
    if what == "spec":
        spec = spec_of(STACKS, shard=6)
    elif what == "pool":
        folder = tmp_path / "other"
        shutil.copytree(workshop / "few", folder / "few")
        shutil.copytree(workshop / "forced", folder / "forced")
        lines = (folder / "few" / "probes.jsonl").read_text().replace("?", "??", 1)
        (folder / "few" / "probes.jsonl").write_text(lines)
    else:
        model = tmp_path / "model"
        shutil.copytree(lab_checkpoint(quiet), model)
        edited = json.loads((model / "config.json").read_text()) | {"rope_theta": 99999.0}
        (model / "config.json").write_text(json.dumps(edited))
        spec = spec_of(STACKS, weights={"source": "the lab", "precision": "bfloat16", "folder": str(model)})
    with pytest.raises(ConfigurationError, match="beginning of another build") as error:
        build_bundle(spec, folder, half_built, quiet, quiet)
    assert "--out" in one_line(error)
    assert contents(partial) == recorded
    assert not half_built.exists()


def test_weights_whose_hash_changed_stop_a_build_before_it_begins(workshop: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(lab_checkpoint(quiet), model)
    files = {"model.safetensors": sha256_hex((model / "model.safetensors").read_bytes())}
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    weights = {"source": "the lab", "precision": "bfloat16", "folder": str(model), "files": files}
    with pytest.raises(ConfigurationError, match=r"model\.safetensors does not have the hash") as error:
        build_bundle(spec_of(STACKS, weights=weights), workshop, tmp_path / "out", quiet, quiet)
    one_line(error)
    assert not (tmp_path / "out").exists()


def test_a_probe_longer_than_the_context_is_named_before_anything_runs(workshop: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(lab_checkpoint(quiet), model)
    edited = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 50}
    (model / "config.json").write_text(json.dumps(edited))
    weights = {"source": "the lab", "precision": "bfloat16", "folder": str(model)}
    with pytest.raises(BundleError, match=r"the probe \S+ has \d\d+ tokens, the context of hf-float32 50") as error:
        build_bundle(spec_of(STACKS, weights=weights), workshop, tmp_path / "out", quiet, quiet)
    assert "pool" in one_line(error)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_finished_bundle_is_never_overwritten(workshop: Path, whole: Bundle) -> None:
    before = contents(whole.path)
    with pytest.raises(BundleError, match="already holds a bundle") as error:
        build_bundle(spec_of(STACKS), workshop, whole.path, quiet, quiet)
    one_line(error)
    assert contents(whole.path) == before


def test_an_engine_that_fails_keeps_what_was_recorded(
    workshop: Path, whole: Bundle, half_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = half_built.with_name("out.partial")
    (partial / "int8" / "00002.npz").unlink()
    recorded = contents(partial)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "forward", full)
        with pytest.raises(BundleError, match="does not suffice") as error:
            build_bundle(spec_of(STACKS), workshop, half_built, quiet, quiet)
    assert "what was recorded is kept" in one_line(error)
    assert contents(partial) == recorded
    build_bundle(spec_of(STACKS), workshop, half_built, quiet, quiet)
    assert (half_built / "arrays.npz").read_bytes() == (whole.path / "arrays.npz").read_bytes()


# -- split and merged ------------------------------------------------------------------------------------------------


def test_stacks_that_were_built_apart_merge_to_the_bundle_of_one_machine(
    workshop: Path, whole: Bundle, tmp_path: Path
) -> None:
    first = build(workshop, tmp_path / "first", [FLOAT32, BFLOAT16])
    second = build(workshop, tmp_path / "second", [FLOAT32, INT8, INT4], first)
    log = [json.loads(line)["stack"] for line in (tmp_path / "second" / "build-log.jsonl").read_text().splitlines()]
    assert set(log) == {"int8", "int4"}  # the reference was not run a second time
    manifest, arrays, _ = merge([first, second])
    assert arrays == (whole.path / "arrays.npz").read_bytes()
    assert _document(manifest) == _document(whole.manifest)


def _document(manifest: Manifest) -> Any:
    """As it is written: numbers with the digits that a manifest has."""
    return json.loads(
        json.dumps(manifest.model_dump(mode="json", by_alias=True)),
        parse_float=lambda text: float(f"{float(text):.6g}"),
    )


def test_a_reference_for_other_probes_is_refused(workshop: Path, whole: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"other .*top_k.* than the spec") as error:
        build(workshop, tmp_path / "other", [FLOAT32, INT8], whole, top_k=41)
    one_line(error)


def test_a_bundle_of_the_reference_alone_needs_no_engine_when_it_is_taken_from_another(
    workshop: Path, whole: Bundle, tmp_path: Path
) -> None:
    alone = build(workshop, tmp_path / "alone", [FLOAT32], whole)
    assert np.array_equal(alone.logprobs_nats[0], whole.logprobs_nats[0])
    assert alone.manifest.stacks[0].engine == whole.manifest.stacks[0].engine


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_a_real_llamacpp_of_the_same_weights_is_as_near_as_half_floats_are(compared: Bundle) -> None:
    noise = {stack.id: stack.noise_nats for stack in compared.manifest.stacks}
    print(noise)  # noqa: T201
    assert noise["lab-f16"] is not None
    assert 1e-4 < noise["lab-f16"] < 0.006
    # Stated in the manifest as it is computed here, over the 20 likeliest tokens of each one-token probe.
    base = compared.logprobs_nats[0].astype(np.float64)
    official = compared.pool_at("L3")
    assert official is not None
    rows = [compared.row_index[compared.manifest.probe_ids[i]] for i in official.probes]
    assert len(rows) == 11
    columns, own = own_top(compared.logprobs_nats[1][rows].astype(np.float64), 20)
    scales = log_scale(centred_difference(own, np.take_along_axis(base[rows], columns, axis=1)))
    assert noise["lab-f16"] == pytest.approx(float(np.exp(np.nanmean(scales))), rel=1e-4)
    int8, int4 = noise["int8"], noise["int4"]
    assert int8 is not None
    assert int4 is not None
    assert noise["lab-f16"] < int8 < int4


def test_forced_text_rows_are_teacher_forced_scores(whole: Bundle, workshop: Path) -> None:
    index = whole.probe_index["forced-tea"]
    ids = whole.prompt_ids[whole.prompt_offsets[index] : whole.prompt_offsets[index + 1]].tolist()
    rows = np.flatnonzero(whole.row_probe == index)
    folder = lab_checkpoint(quiet)
    from tokenizers import Tokenizer

    continuation = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(ANSWER, add_special_tokens=False).ids
    assert ids[-len(continuation) :] == continuation
    asked = len(ids) - len(continuation)
    # After the last token of the question, and every eighth one from there that another one follows.
    positions = list(range(asked - 1, len(ids) - 1, EVERY))
    assert whole.row_position[rows].tolist() == positions
    assert len(positions) > 3
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(plain(torch.tensor([ids])).logits[0].double(), dim=-1).numpy()[positions]
    found = whole.logprobs_nats[0][rows]
    there = np.take_along_axis(logprobs, whole.token_ids[rows].astype(np.int64), axis=1)
    np.testing.assert_allclose(found, there, rtol=0, atol=2e-4)
    # It is the model's own surprise at the text that stands there: the token that follows is likely where it is listed.
    follows = np.array([ids[position + 1] for position in positions])
    assert (whole.token_ids[rows] == follows[:, None]).any(axis=1).mean() > 0.5


def test_every_stack_is_recorded_with_what_it_is(whole: Bundle) -> None:
    stacks = {stack.id: stack for stack in whole.manifest.stacks}
    assert list(stacks) == [stack["id"] for stack in STACKS]
    assert [stacks[n].family for n in ("hf-float32", "hf-bfloat16")] == [
        "transformers/float32",
        "transformers/bfloat16",
    ]
    assert stacks["int8"].precision.model_dump() == {
        "weights": "int8", "activations": "float32", "kv_cache": "float32", "logits": "float32",
    }  # fmt: skip
    assert stacks["int8"].bits_held == pytest.approx(9.7, abs=0.05)
    assert stacks["hf-float32"].noise_nats == 0
    noise = {name: stack.noise_nats or 0.0 for name, stack in stacks.items()}
    assert 0.03 < noise["hf-bfloat16"] < 0.09
    # The one honest stack beside the reference is noisier than int8, so that int8 cannot be told from it by size.
    assert stacks["int8"].indistinguishable == (noise["int8"] < noise["hf-bfloat16"])
    assert not stacks["int4"].indistinguishable
    assert noise["int4"] > 2 * noise["hf-bfloat16"]


def test_another_rendering_is_recorded_after_the_official_one_where_it_was_asked(whole: Bundle) -> None:
    probes = [probe for name in ("few", "forced") for probe in load_pool(str(whole.path / "pools" / name)).probes]
    ids = [probe.id for probe in probes]
    rendered = [f"{name}@{OTHER_TEMPLATE}" for name in ids[:RENDERED]]
    assert whole.manifest.probe_ids == ids + rendered
    assert [pool.key for pool in whole.manifest.pools] == ["few", "forced", f"few@{OTHER_TEMPLATE}"]
    pool = whole.pool_at("L3", OTHER_TEMPLATE)
    assert pool is not None
    assert whole.usable_probes(pool) == rendered
    own_system = np.array([probe.messages[0].role == "system" for probe in probes + probes[:RENDERED]])
    other = whole.prompt_tokens[[h.id for h in whole.manifest.hypotheses].index(OTHER_TEMPLATE)]
    assert (other < whole.prompt_tokens[0]).tolist() == (~own_system).tolist()
    assert (other[own_system] == whole.prompt_tokens[0][own_system]).all()
    for i, name in enumerate(ids[:RENDERED]):
        prompt, official = whole.prompt_of(rendered[i]), whole.prompt_of(name)
        assert len(prompt) == other[i]
        assert (prompt == official) == own_system[i]
        found, known = (whole.logprobs_nats[0, whole.row_index[one]] for one in (rendered[i], name))
        # The same tokens are answered alike, up to rounding; without the default system message, otherwise.
        assert (float(np.abs(found - known).max()) < 1e-3) == own_system[i]
    rows = np.isin(whole.row_probe, pool.probes)
    assert np.isfinite(whole.logprobs_nats[:, ~rows]).all()
    for stack, values in zip(whole.manifest.stacks, whole.logprobs_nats, strict=True):
        asked = stack.id in RENDERED_ON
        assert (pool.key in stack.pools) == asked
        assert np.isnan(values[rows]).all() != asked
        assert np.isfinite(values[rows]).all() == asked
    assert (whole.path / "pools" / "few" / "probes.jsonl").is_file()


def test_select_keeps_the_most_telling_probes_and_says_what_it_saw(compared: Bundle) -> None:
    pool = compared.pool_at("L3")
    assert pool is not None
    few = [compared.manifest.probe_ids[i] for i in pool.probes]
    found = select(compared, "L3", 5)
    assert found.honest_stacks_seen == ["lab-f16"]
    assert found.variants_seen == ["int8", "int4"]
    assert found.candidate_pools == {"few": pool.sha256}
    assert (found.candidates_considered, found.candidates) == (11, compared.identity)
    assert 1 <= len(found.chosen) <= 5
    assert {probe.id for probe in found.chosen} <= set(few)
    assert 1 <= found.effective_sample_size <= len(found.chosen) + 1e-9

    def scale(stack: str, name: str) -> float:
        values = compared.logprobs_nats[compared.stack_index[stack], compared.row_index[name]].astype(np.float64)
        top = np.argsort(-values, kind="stable")[:20]
        change = values[top] - compared.logprobs_nats[0, compared.row_index[name]].astype(np.float64)[top]
        return float(np.log(np.sqrt(np.square(change - change.mean()).mean())))

    evidence = {
        name: np.mean([max(scale(variant, name) - scale("lab-f16", name), 0) for variant in ("int8", "int4")])
        / compared.prompt_tokens[0, compared.probe_index[name]]
        for name in few
    }
    for probe in found.chosen:
        assert probe.evidence_per_token == pytest.approx(evidence[probe.id], rel=1e-3)
        assert probe.value > 0
    best = max(evidence, key=lambda name: float(evidence[name]))
    assert best in {probe.id for probe in found.chosen}
    without = select(compared, "L3", 5, frozenset({best}))
    assert best not in {probe.id for probe in without.chosen}
    assert without.candidates_considered == 10


def test_select_refuses_a_bundle_without_variants_or_candidates(whole: Bundle, compared: Bundle) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: select(compared, "L5", 5),
        lambda: select(compared, "L3", 5, frozenset(compared.manifest.probe_ids)),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError) as error:
            call()
        one_line(error)
