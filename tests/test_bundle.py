"""Reference bundles: loading, tampering, merging, comparing, and the commands that show all that."""

import dataclasses
import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import Weighbridge
from weighbridge.canonical import sha256_hex
from weighbridge.cli.reference_build import plan_lines, planned, progress, span
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.probes import load_pool
from weighbridge.records import Cause, checked
from weighbridge.reference import rerun as rerun_module
from weighbridge.reference.build import write_bundle
from weighbridge.reference.bundle import (
    ARRAYS,
    SCHEMA_FILE,
    Bundle,
    HypothesisRecord,
    Manifest,
    PoolRecord,
    Precision,
    StackRecord,
    WeightsSource,
    bundle_schema,
    load_bundle,
    pack_arrays,
    vocabulary_digest,
)
from weighbridge.reference.checkpoint import Checkpoint
from weighbridge.reference.compare import add_pools, differences, merge
from weighbridge.reference.engine import Prompt, Rows
from weighbridge.reference.licence import LicenceAsk, LicenceSpec, read_licence
from weighbridge.reference.local import LocalSetting
from weighbridge.reference.noise import one_token_rows, with_noise
from weighbridge.reference.rerun import (
    FLOAT32_NATS,
    LATTICE_NATS,
    LATTICE_STEPS,
    _batches,
    allowance,
    open_original,
    setting_of,
)
from weighbridge.reference.spec import Spec

PROBES, K, TOKENS = 6, 24, 60
VOCABULARY = [b"", *(bytes([97 + i % 26]) * (1 + i // 26) for i in range(TOKENS - 1))]
LICENCE = "An Example Licence\n\n1. Use\n\nYou must retain the notice in all copies that you make.\n"
NOISE = {"ref": 0.0, "honest": 0.02, "int8": 0.1, "nf4": 0.3}
DEPARTURES: dict[str, Cause] = {"int8": "precision", "nf4": "precision"}


def stack_record(name: str, **changes: Any) -> StackRecord:
    kept = "float32" if name == "ref" else "bfloat16"
    record = StackRecord(
        id=name, description=f"the stack {name}", departure=DEPARTURES.get(name), departure_class=None,
        variant=name if name in DEPARTURES else None, family=f"transformers/{kept}", pools=["small"],
        precision=Precision(weights=kept, activations=kept, kv_cache=kept, logits=kept),
        engine={"engine": "a test", "hardware": "none", "dtype": kept, "batch": 4},
    )  # fmt: skip
    return record.model_copy(update=changes)


def values(stacks: list[str], noise: dict[str, float] = NOISE) -> NDArray[np.float32]:
    base = -np.sort(np.random.default_rng(1).exponential(4, (PROBES, K)), axis=1)
    out = [base + noise[s] * np.random.default_rng(sum(s.encode())).standard_normal((PROBES, K)) for s in stacks]
    return np.stack(out).astype(np.float32)


def arrays_of(stacks: list[str], **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    return {
        "prompt_ids": rng.integers(1, TOKENS, PROBES * 5), "prompt_offsets": np.arange(PROBES + 1) * 5,
        "row_probe": np.arange(PROBES, dtype=np.int32), "row_position": np.full(PROBES, 4),
        "token_ids": np.stack([rng.permutation(TOKENS)[:K] for _ in range(PROBES)]),
        "logprobs_nats": values(stacks), "prompt_tokens": np.full((2, PROBES), 5),
    } | changes  # fmt: skip


def make(
    folder: Path, stacks: tuple[str, ...] | list[str] = tuple(NOISE), *, texts: str = "Say {}.", licence: str | None = LICENCE,
    records: dict[str, dict[str, Any]] | None = None, arrays: dict[str, Any] | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """Write a bundle as a build would, without any engine."""
    pool_folder = folder / "pools" / "small"
    pool_folder.mkdir(parents=True, exist_ok=True)
    pool_folder.joinpath("pool.toml").write_text(
        'schema = "weighbridge/pool/2"\nid = "small"\nversion = 1\nlevel = "L3"\n'
        + "".join(
            f'{name} = "x"\n'
            for name in ("lifecycle", "visibility", "family", "motivation", "cost", "needs", "licence")
        )
    )
    ids = [f"p-{i}" for i in range(PROBES)]
    lines = [{"id": p, "purpose": "x", "messages": [{"role": "user", "content": texts.format(p)}]} for p in ids]
    pool_folder.joinpath("probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record, text = None, b""
    if licence is not None:
        spec = LicenceSpec(identifier="Example-1", file="licence.txt", source="a test",
                           asks=[LicenceAsk(kind="notice", quote="You must retain the notice in all copies")])  # fmt: skip
        (folder / "licence.txt").write_text(licence)
        record, text = read_licence(spec, folder)
    content = arrays_of(list(stacks), **(arrays or {}))
    packed = pack_arrays(content, VOCABULARY)
    pools = [PoolRecord(**load_pool(str(pool_folder)).identity.model_dump(), level="L3", probes=list(range(PROBES)))]
    stack_records = [stack_record(name, **(records or {}).get(name, {})) for name in stacks]
    manifest = Manifest(
        id="small", version=1, model="Small-1B", model_names=["small"], keeper="a test", built_with="weighbridge 0",
        weights=WeightsSource(source="nowhere", precision="16 bit", files={"model.safetensors": "0" * 64}), licence=record,
        vocabulary_sha256=vocabulary_digest(VOCABULARY), template_sha256="1" * 64, pools=pools, probe_ids=ids, top_k=K, shard=4,
        reference_stack=stacks[0], hypotheses=[
            HypothesisRecord(id="official", description="the template", cause=None, template_sha256="1" * 64),
            HypothesisRecord(id="none", description="no template", cause="template", template_sha256="2" * 64),
        ],
        stacks=with_noise(stack_records, content["logprobs_nats"], stacks[0], one_token_rows(pools, content["row_probe"])),
        arrays_sha256=sha256_hex(packed),
    )  # fmt: skip
    write_bundle(folder, manifest.model_copy(update=changes), packed, text)
    return folder


def loaded(folder: Path, *rest: Any, **changes: Any) -> Bundle:
    return load_bundle(str(make(folder, *rest, **changes)))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def swap_arrays(folder: Path, data: bytes) -> None:
    """Put other arrays in, with a manifest that fits: what a hostile keeper would do."""
    (folder / "arrays.npz").write_bytes(data)
    edit(folder, lambda m: m.update(arrays_sha256=sha256_hex(data)))


def unpacked(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / "arrays.npz") as found:
        return {name: found[name] for name in found.files}


def saved(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


# -- loading ---------------------------------------------------------------------------------------------------


def test_a_bundle_is_loaded_as_it_was_written(whole: Path) -> None:
    bundle = load_bundle(str(whole))
    assert bundle.logprobs_nats.tobytes() == values(list(NOISE)).tobytes()
    assert bundle.vocabulary == tuple(VOCABULARY)
    assert bundle.usable_probe_ids == bundle.manifest.probe_ids
    noise = {s.id: s.noise_nats or 0 for s in bundle.manifest.stacks}
    assert list(noise) == sorted(noise, key=lambda name: noise[name])


def test_a_part_without_departures_can_be_loaded(tmp_path: Path) -> None:
    assert len(loaded(tmp_path, ["ref"]).manifest.stacks) == 1


def longer(values: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([values, values[-1:]])


def replaced(values: NDArray[Any], index: Any, value: Any) -> NDArray[Any]:
    out = values.copy()
    out[index] = value
    return out


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_another_type_is_refused(copy: Path, name: str) -> None:
    arrays = unpacked(copy)
    swap_arrays(copy, saved(arrays | {name: arrays[name].astype(np.float64)}))
    with pytest.raises(BundleError, match=f"{name} is float64"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_array_is_refused(copy: Path, name: str) -> None:
    arrays = unpacked(copy)
    del arrays[name]
    swap_arrays(copy, saved(arrays))
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", ["prompt_offsets", "row_position", "token_ids", "logprobs_nats", "prompt_tokens"])
def test_an_array_of_another_shape_is_refused(copy: Path, name: str) -> None:
    arrays = unpacked(copy)
    swap_arrays(copy, saved(arrays | {name: longer(arrays[name])}))
    with pytest.raises(BundleError, match=f"{name} is .* is wanted"):
        load_bundle(str(copy))


@pytest.mark.parametrize(
    ("name", "index", "value", "words"),
    [
        ("token_ids", (0, 0), TOKENS, "token_ids points outside"),
        ("token_ids", (0, 0), -1, "token_ids points outside"),
        ("prompt_ids", 0, TOKENS, "prompt_ids points outside"),
        ("row_probe", 0, PROBES, "row_probe points outside"),
        ("row_probe", 0, 1, "a probe has no row"),
        ("row_position", 0, 5, "row_position points outside"),
        ("row_position", 0, -1, "row_position points outside"),
        ("prompt_offsets", 0, 1, "prompt_offsets do not divide"),
        ("prompt_offsets", -1, 10**12, "prompt_offsets do not divide"),
        ("prompt_offsets", 2, 5, "prompt_offsets do not divide"),
        ("vocabulary_bytes", 0, 0, "the vocabulary is not the one"),
        ("vocabulary_offsets", 3, 10**12, "vocabulary_offsets do not divide the vocabulary"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(copy: Path, name: str, index: Any, value: int, words: str) -> None:
    arrays = unpacked(copy)
    swap_arrays(copy, saved(arrays | {name: replaced(arrays[name], index, value)}))
    with pytest.raises(BundleError, match=words):
        load_bundle(str(copy))


def test_pickled_objects_are_never_loaded(copy: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was run",))

    objects = np.array([Bomb()], dtype=object)
    swap_arrays(copy, saved(unpacked(copy) | {"token_ids": objects}))
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(str(copy))


def bomb(folder: Path, *, declared: int, header: bytes) -> bytes:
    """Arrays of which one is declared to be so large."""
    buffer = io.BytesIO((folder / "arrays.npz").read_bytes())
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # the name stands twice, and the later one is read
        archive.writestr("logprobs_nats.npy", header + bytes(2**16))
        archive.infolist()[-1].file_size = declared
    return buffer.getvalue()


def test_an_array_that_inflates_to_gigabytes_is_refused_before_it_is_inflated(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_arrays(copy, bomb(copy, declared=3 * 2**30, header=b""))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(BundleError, match="unpacks to more than 2 GiB"):
        load_bundle(str(copy))


@pytest.mark.parametrize("declared", [2**10, 2**17])
def test_an_array_that_says_it_is_larger_than_its_file_is_refused(copy: Path, declared: int) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)})
    swap_arrays(copy, bomb(copy, declared=declared, header=header.getvalue()))
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(str(copy))


@pytest.mark.parametrize("data", [b"", b"not a zip", b"\x93NUMPY\x01\x00"])
def test_arrays_that_are_no_archive_are_refused(copy: Path, data: bytes) -> None:
    swap_arrays(copy, data)
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(str(copy))


def test_a_changed_byte_of_any_hashed_file_is_found(copy: Path) -> None:
    with (copy / "arrays.npz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="does not have the hash"):
        load_bundle(str(copy))


def test_another_licence_text_is_refused(copy: Path) -> None:
    (copy / "licence.txt").write_text(LICENCE.replace("must", "may"))
    with pytest.raises(BundleError, match="does not have the hash"):
        load_bundle(str(copy))
    (copy / "licence.txt").unlink()
    with pytest.raises(BundleError, match="there is no file"):
        load_bundle(str(copy))


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a pool twice": (lambda m: m["pools"].append(m["pools"][0]), "a pool stands twice"),
    "a probe twice": (lambda m: m["probe_ids"].__setitem__(1, "p-0"), "a probe stands twice"),
    "a pool's probe that is not there": (lambda m: m["pools"][0]["probes"].append(PROBES), "names a probe that is not there"),
    "a stack twice": (lambda m: m["stacks"][1].update(id="ref"), "a stack stands twice"),
    "no reference": (lambda m: m.update(reference_stack="other"), "the reference stack is missing"),
    "a reference that departs": (lambda m: m["stacks"][0].update(departure="precision"), "the reference stack is missing"),
    "no hypothesis": (lambda m: m.update(hypotheses=[]), "token counts are missing"),
    "no pool": (lambda m: m.update(pools=[]), "field pools"),
    "an unknown field": (lambda m: m.update(run_this="rm"), "unknown field run_this"),
    "another schema": (lambda m: m.update(schema="weighbridge/bundle/1"), "field schema"),
    "another vocabulary": (lambda m: m.update(vocabulary_sha256="0" * 64), "the vocabulary is not the one"),
    "a noise that is no number": (lambda m: m["stacks"][0].update(noise_nats=float("nan")), "field stacks.0.noise_nats"),
}  # fmt: skip
for _id in ("..", ".", "../x", "a/b", "", "A", "x\n", "x" * 81):
    MANIFESTS |= {
        f"bundle {_id!r:.20}": (lambda m, i=_id: m.update(id=i), "field id"),  # type: ignore[misc]
        f"pool {_id!r:.20}": (lambda m, i=_id: m["pools"][0].update(id=i), "field pools.0.id"),  # type: ignore[misc]
        f"stack {_id!r:.20}": (lambda m, i=_id: m["stacks"][1].update(id=i), "field stacks.1.id"),  # type: ignore[misc]
    }


@pytest.mark.parametrize(("change", "words"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_cannot_be_right_is_refused_in_one_line(
    copy: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=words) as caught:
        load_bundle(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"schema": 1}', "\ud800".encode("utf-8", "surrogatepass")])
def test_what_is_no_manifest_is_refused(copy: Path, text: str | bytes) -> None:
    (copy / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BundleError):
        load_bundle(str(copy))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_arrays_are_refused_or_unharmed(whole: Path, place: int, byte: int) -> None:
    data = bytearray((whole / "arrays.npz").read_bytes())
    data[place % len(data)] = byte
    folder = whole.parent / "damaged"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    swap_arrays(folder, bytes(data))
    said = ""
    try:
        load_bundle(str(folder))
    except BundleError as error:
        said = str(error)
    assert "\n" not in said


# -- merging ---------------------------------------------------------------------------------------------------


def test_parts_are_merged_into_what_one_machine_would_have_built(whole: Path, tmp_path: Path) -> None:
    a = loaded(tmp_path / "a", ["ref", "honest"])
    b = loaded(tmp_path / "b", ["ref", "int8", "nf4"])
    manifest, arrays, text = merge([a, b])
    write_bundle(tmp_path / "m", manifest, arrays, text)
    assert load_bundle(str(tmp_path / "m")).manifest == load_bundle(str(whole)).manifest
    assert (tmp_path / "m" / "arrays.npz").read_bytes() == (whole / "arrays.npz").read_bytes()
    assert text == LICENCE.encode()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sets(st.sampled_from(["honest", "int8", "nf4"])), min_size=1, max_size=3))
def test_a_merge_holds_every_stack_once_in_the_order_given(
    tmp_path_factory: pytest.TempPathFactory, parts: list[set[str]]
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    given_stacks = [["ref", *sorted(part)] for part in parts]
    bundles = [loaded(folder / str(i), stacks) for i, stacks in enumerate(given_stacks)]
    manifest, arrays, _ = merge(bundles)
    assert [s.id for s in manifest.stacks] == list(dict.fromkeys(name for stacks in given_stacks for name in stacks))
    assert sha256_hex(arrays) == manifest.arrays_sha256
    assert merge([*bundles, *bundles])[1] == arrays


def test_noise_is_stated_anew_by_a_merge(tmp_path: Path) -> None:
    a = loaded(tmp_path / "a", ["ref", "nf4"])
    b = loaded(
        tmp_path / "b", ["ref", "honest"], arrays={"logprobs_nats": values(["ref", "honest"], NOISE | {"honest": 1.0})}
    )
    assert not a.manifest.stacks[1].indistinguishable
    assert next(s for s in merge([a, b])[0].stacks if s.id == "nf4").indistinguishable


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "differ in version"),
        ({"id": "other"}, "differ in id"),
        ({"weights": WeightsSource(source="x", precision="16 bit", files={})}, "differ in weights"),
        ({"licence": None}, "differ in licence"),
        ({"texts": "Write {}."}, "differ in pools"),
        ({"arrays": {"prompt_ids": np.full(PROBES * 5, 3)}}, "differ in prompt_ids"),
        ({"arrays": {"token_ids": np.tile(np.arange(K), (PROBES, 1))}}, "differ in token_ids"),
        ({"arrays": {"logprobs_nats": values(["ref", "int8"]) + np.float32(1e-6)}}, "stack ref has other logprobs"),
        ({"records": {"ref": {"description": "another"}}}, "stack ref has other settings"),
        ({"records": {"int8": {"start_command": "another"}}}, "stack int8 has other settings"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_not_merged(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    a = loaded(tmp_path / "a", ["ref", "int8"])
    b = loaded(tmp_path / "b", ["ref", "int8"], **change)
    with pytest.raises(BundleError, match=words) as caught:
        merge([a, b])
    assert "--reference-from" in str(caught.value) or "another id" in str(caught.value)


def part_of(bundle: Bundle, rows: slice, name: str, folder: Path, stacks: list[str], **changes: Any) -> Bundle:
    """A bundle of some of another's probes, in a pool of this name, by some of its stacks."""
    kept = list(range(bundle.row_probe.size))[rows]
    manifest = bundle.manifest
    logprobs = bundle.logprobs_nats[[bundle.stack_index[stack] for stack in stacks]][:, kept]
    arrays = pack_arrays(
        {
            "prompt_ids": bundle.prompt_ids.reshape(-1, 5)[kept].ravel(), "prompt_offsets": np.arange(len(kept) + 1) * 5,
            "row_probe": np.arange(len(kept)), "row_position": bundle.row_position[kept], "token_ids": bundle.token_ids[kept],
            "logprobs_nats": logprobs, "prompt_tokens": bundle.prompt_tokens[:, kept],
        },
        VOCABULARY,
    )  # fmt: skip
    pool = manifest.pools[0].model_copy(update={"id": name, "probes": list(range(len(kept)))})
    records = [
        bundle.manifest.stacks[bundle.stack_index[stack]].model_copy(update={"pools": [name]}) for stack in stacks
    ]
    part = manifest.model_copy(
        update={
            "pools": [pool], "probe_ids": [manifest.probe_ids[i] for i in kept], "arrays_sha256": sha256_hex(arrays),
            "stacks": with_noise(records, logprobs, "ref", np.arange(len(kept))),
        } | changes
    )  # fmt: skip
    folder.mkdir()
    write_bundle(folder, part, arrays, LICENCE.encode())
    return load_bundle(str(folder))


def test_pools_that_were_recorded_later_are_added(whole: Path, tmp_path: Path) -> None:
    bundle = load_bundle(str(whole))
    first = part_of(bundle, slice(0, 3), "first", tmp_path / "a", ["ref", "honest", "int8", "nf4"])
    later = part_of(bundle, slice(3, None), "later", tmp_path / "b", ["ref", "honest", "int8"], version=2)
    manifest, arrays, text = add_pools(first, later)
    (tmp_path / "c").mkdir()
    write_bundle(tmp_path / "c", manifest, arrays, text)
    joined = load_bundle(str(tmp_path / "c"))
    assert manifest.version == 2
    assert {s.id: s.pools for s in joined.manifest.stacks} == {
        "ref": ["first", "later"], "honest": ["first", "later"], "int8": ["first", "later"], "nf4": ["first"],
    }  # fmt: skip
    for name in ("prompt_ids", "prompt_offsets", "row_probe", "row_position", "token_ids", "prompt_tokens"):
        assert np.array_equal(getattr(joined, name), getattr(bundle, name)), name
    assert np.array_equal(joined.logprobs_nats[:3], bundle.logprobs_nats[:3])
    assert np.array_equal(joined.logprobs_nats[3, :3], bundle.logprobs_nats[3, :3])
    assert np.isnan(joined.logprobs_nats[3, 3:]).all()
    assert [s.noise_nats for s in joined.manifest.stacks][:3] == [s.noise_nats for s in bundle.manifest.stacks][:3]


def test_a_pool_that_was_recorded_again_is_replaced(whole: Path, tmp_path: Path) -> None:
    bundle = load_bundle(str(whole))
    first = part_of(bundle, slice(0, 3), "pool", tmp_path / "a", ["ref", "honest", "nf4"])
    later = part_of(bundle, slice(3, None), "pool", tmp_path / "b", ["ref", "honest"], version=2)
    manifest, _, _ = add_pools(first, later)
    assert manifest.probe_ids == bundle.manifest.probe_ids[3:]
    assert [s.pools for s in manifest.stacks] == [["pool"], ["pool"], []]


def test_a_pool_that_is_replaced_keeps_its_place(whole: Path, tmp_path: Path) -> None:
    bundle = load_bundle(str(whole))
    first = part_of(bundle, slice(0, 2), "one", tmp_path / "a", ["ref"])
    both = add_pools(first, part_of(bundle, slice(2, 4), "two", tmp_path / "b", ["ref"], version=2))
    (tmp_path / "c").mkdir()
    write_bundle(tmp_path / "c", *both)
    again = part_of(bundle, slice(4, None), "one", tmp_path / "d", ["ref"], version=3)
    manifest, _, _ = add_pools(load_bundle(str(tmp_path / "c")), again)
    assert [pool.id for pool in manifest.pools] == ["one", "two"]
    assert manifest.probe_ids == [*bundle.manifest.probe_ids[4:], *bundle.manifest.probe_ids[2:4]]


def test_pools_recorded_with_other_packages_name_both_lists(whole: Path, tmp_path: Path) -> None:
    bundle = load_bundle(str(whole))
    records = [s.model_copy(update={"engine": s.engine | {"lock_sha256": "a" * 64}}) for s in bundle.manifest.stacks]
    locked = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"stacks": records}))
    first = part_of(bundle, slice(0, 3), "first", tmp_path / "a", ["ref"])
    later = part_of(locked, slice(3, None), "later", tmp_path / "b", ["ref"])
    assert add_pools(first, later)[0].stacks[0].engine["lock_sha256@later"] == "a" * 64


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (slice(2, None), {}, "the probe p-2 stands in a pool of"),
        (slice(3, None), {"template_sha256": "5" * 64}, "differ in template_sha256"),
        (slice(3, None), {"stacks": [stack_record("ref", pools=["later"], start_command="another")]}, "stack ref has other settings"),
    ],
)  # fmt: skip
def test_pools_of_other_probes_or_stacks_are_not_added(
    whole: Path, tmp_path: Path, rows: slice, changes: dict[str, Any], words: str
) -> None:
    bundle = load_bundle(str(whole))
    first = part_of(bundle, slice(0, 3), "first", tmp_path / "a", ["ref"])
    later = part_of(bundle, rows, "later", tmp_path / "b", ["ref"])
    later = dataclasses.replace(later, manifest=later.manifest.model_copy(update=changes))
    with pytest.raises(BundleError, match=words):
        add_pools(first, later)


# -- comparing -------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "version": ({"version": 2}, ("manifest", "changed", "version")),
    "keeper": ({"keeper": "another"}, ("manifest", "changed", "keeper")),
    "weights": ({"weights": WeightsSource(source="nowhere", precision="16 bit", files={"model.safetensors": "3" * 64})}, ("weights", "changed", "model.safetensors")),
    "a file": ({"weights": WeightsSource(source="nowhere", precision="16 bit", files={"model.safetensors": "0" * 64, "config.json": "4" * 64})}, ("weights", "added", "config.json")),
    "template": ({"template_sha256": "5" * 64}, ("template", "changed", "official")),
    "pool": ({"texts": "Write {}."}, ("pool", "changed", "small")),
    "hypothesis": ({"hypotheses": [HypothesisRecord(id=i, description="x", cause=None, template_sha256="1" * 64) for i in ("official", "new")]}, ("hypothesis", "added", "new")),
    "prompts": ({"arrays": {"prompt_ids": replaced(arrays_of(["ref"])["prompt_ids"], 0, 1)}}, ("prompts", "changed", "1 of 6 probes")),
    "token counts": ({"arrays": {"prompt_tokens": np.full((2, PROBES), 6)}}, ("arrays", "changed", "arrays.npz")),
    "a stack more": ({"stacks": ["ref", "honest", "int8", "nf4"]}, ("stack", "added", "nf4")),
    "a stack less": ({"stacks": ["ref", "honest"]}, ("stack", "removed", "int8")),
    "a setting": ({"records": {"int8": {"engine": {"engine": "a test", "hardware": "none", "dtype": "bfloat16", "batch": 9}}}}, ("stack", "changed", "int8")),
    "no licence": ({"licence": None}, ("licence", "removed", "Example-1")),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_each_kind_of_change_is_named(tmp_path: Path, change: dict[str, Any], expected: tuple[str, str, str]) -> None:
    a = loaded(tmp_path / "a", ["ref", "honest", "int8"])
    b = loaded(tmp_path / "b", **({"stacks": ["ref", "honest", "int8"]} | change))
    assert expected in [(d.kind, d.change, d.name) for d in differences(a, b)]
    assert differences(a, a) == []


def test_a_setting_is_named_by_its_field(tmp_path: Path) -> None:
    a, b = loaded(tmp_path / "a"), loaded(tmp_path / "b", records={"int8": {"engine": {"batch": 9}}})
    detail = next(d.detail for d in differences(a, b) if d.kind == "stack")
    assert "engine.batch: 4 → 9" in detail


@pytest.mark.parametrize("order", ["as it was", "other columns"])
def test_how_far_the_reference_moved_is_stated_at_the_same_tokens(tmp_path: Path, order: str) -> None:
    moved = arrays_of(list(NOISE))
    moved["logprobs_nats"] = moved["logprobs_nats"].copy()
    moved["logprobs_nats"][0, 2, 3] += np.float32(0.25)
    if order == "other columns":  # the same tokens in another order are the same tokens
        moved |= {"token_ids": moved["token_ids"][:, ::-1], "logprobs_nats": moved["logprobs_nats"][:, :, ::-1]}
    found = [
        d for d in differences(loaded(tmp_path / "a"), loaded(tmp_path / "b", arrays=moved)) if d.kind == "logprobs"
    ]
    assert [d.name for d in found] == ["ref"]
    assert found[0].max_nats == pytest.approx(0.25, rel=1e-4)
    assert found[0].rms_nats == pytest.approx(0.25 / np.sqrt(PROBES * K), rel=1e-4)


def test_added_and_removed_probes_are_listed(tmp_path: Path) -> None:
    renamed = {"probe_ids": [*(f"p-{i}" for i in range(PROBES - 1)), "q"]}
    found = {
        (d.kind, d.change): d.names for d in differences(loaded(tmp_path / "a"), loaded(tmp_path / "b", **renamed))
    }
    assert found[("probes", "removed")] == ["p-5"]
    assert found[("probes", "added")] == ["q"]


def test_what_a_licence_asks_now_is_listed(tmp_path: Path) -> None:
    a = loaded(tmp_path / "a")
    same_words = loaded(tmp_path / "b", licence=LICENCE.replace("\n\nYou", "\n\n\nYou"))
    found = [d for d in differences(a, same_words) if d.kind == "licence"]
    assert ["the same words" in d.detail for d in found] == [True]
    more = loaded(tmp_path / "c", licence=LICENCE + "\nYou must pay a fee for every copy.\n")
    assert ("added", "You must pay a fee for every copy.") in [(d.change, d.detail) for d in differences(a, more)]


# -- schema ----------------------------------------------------------------------------------------------------


def test_the_published_schema_is_the_models() -> None:
    assert SCHEMA_FILE.read_text("utf-8") == bundle_schema(), (
        "regenerate it with `python -m weighbridge.reference.bundle`"
    )


def test_a_manifest_is_valid_under_its_schema(whole: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_bytes()))
    document = json.loads((whole / "manifest.json").read_bytes())
    validator.validate(document)
    for wrong in ({"schema": "weighbridge/bundle/1"}, {"id": ".."}, {"added": 1}):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(document | wrong)


# -- commands --------------------------------------------------------------------------------------------------


def test_show_counts_what_can_be_told_apart(weighbridge_cli: Weighbridge, tmp_path: Path) -> None:
    folder = make(tmp_path / "b", arrays={"logprobs_nats": values(list(NOISE), NOISE | {"honest": 0.2})})
    shown = weighbridge_cli("reference", "show", folder)
    assert shown.code == 0
    assert "honest stacks: 2, of families: 2; variants counted: 1" in shown.said
    assert "indistinguishable: not counted" in shown.said
    assert "notice (line 5" in shown.said
    document = json.loads(weighbridge_cli("reference", "show", folder, "--json").out)
    assert document["schema"] == "weighbridge/reference-show/2"
    assert [s["id"] for s in document["stacks"]] == ["ref", "honest"]
    assert [s["id"] for s in document["variants"]] == ["int8", "nf4"]
    assert document["variants_counted"] == ["nf4"]
    assert document["pools"][0]["prompt_tokens"] == PROBES * 5


def test_nothing_of_a_bundle_steers_the_terminal(weighbridge_cli: Weighbridge, tmp_path: Path) -> None:
    folder = make(
        tmp_path / "b", ["ref", "int8"], model="x\x1b[2J\u202e", records={"int8": {"description": "[red]\x9b"}}
    )
    for arguments in (["show"], ["show", "--json"], ["verify"], ["verify", "--json"]):
        shown = weighbridge_cli("reference", arguments[0], folder, *arguments[1:])
        assert shown.code == 0
        assert all(line.isprintable() for line in shown.out.split("\n"))
    assert "[red]" in weighbridge_cli("reference", "show", folder).out


def test_verify_tells_signatures_apart_by_its_exit_code(
    weighbridge_cli: Weighbridge, copy: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    ended = weighbridge_cli("reference", "verify", copy)
    assert (ended.code, "whole, unsigned" in ended.out) == (0, True)
    assert weighbridge_cli("reference", "keygen", key).code == 0
    assert weighbridge_cli("reference", "sign", copy, "--key", key).code == 0
    ended = weighbridge_cli("reference", "verify", copy)
    assert (ended.code, "someone unknown" in ended.out) == (3, True)
    ended = weighbridge_cli("reference", "verify", copy, "--trusted-key", f"{key}.pub", "--json")
    document = json.loads(ended.out)
    assert (ended.code, document["signature"]["state"], document["pools"][0]["carried"]) == (0, "trusted", True)
    edit(copy, lambda m: m.update(keeper="another"))
    assert weighbridge_cli("reference", "verify", copy, "--trusted-key", f"{key}.pub").code == 2


def test_verify_refuses_a_noise_that_the_logprobs_do_not_have(weighbridge_cli: Weighbridge, copy: Path) -> None:
    edit(copy, lambda m: m["stacks"][2].update(noise_nats=0.5))
    ended = weighbridge_cli("reference", "verify", copy)
    assert (ended.code, "the noise of stack int8" in ended.said) == (2, True)


@pytest.mark.parametrize("change", ["another text", "missing"])
def test_verify_refuses_another_pool(weighbridge_cli: Weighbridge, copy: Path, change: str) -> None:
    path = copy / "pools" / "small" / "probes.jsonl"
    if change == "missing":
        shutil.rmtree(path.parent)
    else:
        path.write_text(path.read_text().replace("Say", "Write"))
    ended = weighbridge_cli("reference", "verify", copy)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "pools/small" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "running probes again needs the original weights"),
        (("--stack", "other"), "the stack other has no local weights"),
        (("--weights", "{tmp}"), "holds no config.json"),
    ],
)
def test_a_rerun_that_cannot_be_is_refused_in_one_line(
    weighbridge_cli: Weighbridge, copy: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    ended = weighbridge_cli("reference", "verify", copy, "--rerun", 2, *(a.format(tmp=tmp_path) for a in arguments))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert words in ended.err


class FakeEngine:
    """Gives back what was recorded, moved by so much on the stack that is named."""

    recorded: Bundle
    moved: dict[str, float]

    def __init__(self, checkpoint: Checkpoint, setting: LocalSetting) -> None:
        self._stack = "honest" if setting.dtype == "bfloat16" else "ref"

    def facts(self) -> dict[str, Any]:
        return {"engine": "a test", "hardware": "another", "threads": None}

    def score(self, prompts: list[Prompt], wanted: list[Any], top_k: int) -> list[Rows]:
        out = []
        for prompt, asked in zip(prompts, wanted, strict=True):
            rows = [self.recorded.row_index[prompt.probe_id]]
            found = self.recorded.logprobs_nats[self.recorded.stack_index[self._stack]][rows]
            moved = self.moved.get(self._stack, 0.0) if asked is not None else self.moved.get("left out", 0.0)
            out.append(Rows(self.recorded.token_ids[rows], found + np.float32(moved)))
        return out


@pytest.mark.parametrize(
    ("moved", "code", "words"),
    [
        ({}, 0, "ref: as recorded: "),
        ({"ref": 0.9 * FLOAT32_NATS}, 0, "ref: as recorded"),
        ({"ref": 1.1 * FLOAT32_NATS}, 1, "ref: NOT as recorded"),
        ({"left out": 0.1}, 1, "ref: NOT as recorded"),
        ({"honest": 0.4}, 0, "honest: as recorded"),
        ({"honest": 0.6}, 1, "honest: NOT as recorded"),
        ({"honest": float("nan")}, 1, "honest: NOT as recorded"),
    ],
)
def test_numbers_that_another_run_does_not_give_end_with_1(
    weighbridge_cli: Weighbridge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moved: dict[str, float],
    code: int,
    words: str,
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"x")
    files = {"config.json": sha256_hex(b"{}"), "model.safetensors": sha256_hex(b"x")}
    folder = make(tmp_path / "b", ["ref", "honest"], weights=WeightsSource(source="x", precision="16 bit", files=files))
    monkeypatch.setattr(rerun_module, "LocalWeights", FakeEngine)
    monkeypatch.setattr(FakeEngine, "recorded", load_bundle(str(folder)), raising=False)
    monkeypatch.setattr(FakeEngine, "moved", moved, raising=False)
    ended = weighbridge_cli("reference", "verify", folder, "--rerun", 1, "--weights", weights)
    assert ended.code == code
    assert any(line.startswith(words) for line in ended.out.splitlines()), ended.out
    ended = weighbridge_cli(
        "reference", "verify", folder, "--rerun", 1, "--weights", weights, "--stack", "ref", "--json"
    )
    assert [done["stack"] for done in json.loads(ended.out)["rerun"]] == ["ref"]


def test_other_weights_are_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    files = {"config.json": sha256_hex(b"{}"), "model.safetensors": sha256_hex(b"x")}
    assert open_original(tmp_path, files).files == files
    for wrong in (
        {**files, "model.safetensors": "0" * 64},
        {**files, "more.safetensors": "0" * 64},
        {"config.json": files["config.json"]},
    ):
        with pytest.raises(BundleError, match=r"safetensors is (missing|not the file)"):
            open_original(tmp_path, wrong)


def test_how_far_a_run_may_be_from_the_recorded_one() -> None:
    assert allowance(LocalSetting(weights="int8"))[0] == FLOAT32_NATS
    assert allowance(LocalSetting(dtype="bfloat16"))[0] == LATTICE_STEPS * LATTICE_NATS["bfloat16"]
    assert allowance(LocalSetting(logits="bfloat16"))[0] == LATTICE_STEPS * LATTICE_NATS["bfloat16"]
    assert allowance(LocalSetting(dtype="float16"))[0] == LATTICE_STEPS * LATTICE_NATS["float16"]


def test_a_stranger_does_not_choose_threads_or_devices() -> None:
    assert setting_of(stack_record("ref", engine={"dtype": "float32", "threads": 10**6}), None).threads is None
    with pytest.raises(ConfigurationError, match="is not at hand"):
        setting_of(stack_record("ref", engine={"device": "disk"}), None)
    with pytest.raises(BundleError, match="there is no rounding"):
        setting_of(stack_record("ref", engine={"weights": "magic"}), None)


def test_batches_are_those_of_a_build() -> None:
    prompts = [Prompt(str(i), (1,) * length, (0,)) for i, length in enumerate([5, 1, 3, 2, 9, 4])]
    assert [[p.probe_id for p in batch] for batch in _batches(prompts, 4, 2)] == [["1", "3"], ["2", "0"], ["5"], ["4"]]


def test_merge_and_diff_at_the_command_line(weighbridge_cli: Weighbridge, whole: Path, tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", ["ref", "honest"]), make(tmp_path / "b", ["ref", "int8", "nf4"])
    ended = weighbridge_cli("reference", "merge", a, b, "--out", tmp_path / "m", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["stacks"] == list(NOISE)
    assert weighbridge_cli("reference", "verify", tmp_path / "m").code == 0
    same = weighbridge_cli("reference", "diff", whole, tmp_path / "m")
    assert (same.code, "the same" in same.out) == (0, True)
    ended = weighbridge_cli("reference", "diff", a, tmp_path / "m")
    assert (ended.code, ended.out) == (1, "added stack: int8\nadded stack: nf4\n")
    document = json.loads(weighbridge_cli("reference", "diff", a, b, "--json").out)
    assert document["same"] is False
    again = weighbridge_cli("reference", "merge", a, b, "--out", tmp_path / "m")
    assert (again.code, again.err.count("\n"), "already holds a bundle" in again.err) == (2, 1, True)
    other = make(tmp_path / "c", ["ref", "nf4"], version=2)
    ended = weighbridge_cli("reference", "merge", a, other, "--out", tmp_path / "n")
    assert (ended.code, ended.err.count("\n"), "differ in version" in ended.err) == (2, 1, True)


@pytest.mark.parametrize("command", ["show", "verify", "diff", "merge"])
def test_a_bundle_that_is_not_there_is_one_line(weighbridge_cli: Weighbridge, command: str, tmp_path: Path) -> None:
    rest: dict[str, list[object]] = {"diff": [tmp_path / "y"], "merge": ["--out", tmp_path / "z"]}
    ended = weighbridge_cli("reference", command, tmp_path / "x", *rest.get(command, []))
    assert (ended.code, ended.err.count("\n"), "there is no reference bundle" in ended.err) == (2, 1, True)


# -- building --------------------------------------------------------------------------------------------------


def test_a_build_says_what_it_is_going_to_do(whole: Path, tmp_path: Path) -> None:
    spec = checked(Spec, {
        "schema": "weighbridge/reference-spec/3", "id": "small", "version": 1, "model": "x", "model_names": [], "keeper": "x",
        "shard": 4, "weights": {"source": "x", "precision": "x", "folder": "x"},
        "pool": [{"name": "small"}], "stack": [
            {"id": "ref", "description": "x", "local": {}},
            {"id": "int8", "description": "x", "departure": "precision", "local": {"weights": "int8"}},
        ],
    }, "here")  # fmt: skip
    out = tmp_path / "out"
    (tmp_path / "out.partial" / "ref").mkdir(parents=True)
    (tmp_path / "out.partial" / "ref" / "00000.npz").touch()
    work = planned(spec, whole / "pools", out, with_reference=True)
    assert [(w.id, w.probes, w.shards, w.shards_done, w.probes_done) for w in work] == [
        ("ref", 6, 2, 1, 4),
        ("int8", 6, 2, 0, 0),
    ]
    lines = plan_lines(spec, out, work)
    assert "stacks to run: 2 (honest: 1, departures: 1)" in lines[0]
    assert "1 of 2 shards on disk" in lines[1]
    assert [w.id for w in planned(spec, whole / "pools", out, with_reference=False)] == ["int8"]


def test_progress_elsewhere_is_a_line_every_50_probes(capsys: pytest.CaptureFixture[str], whole: Path) -> None:
    from weighbridge.cli.reference_build import StackWork

    with progress([StackWork("ref", True, 130, 13, 0, 10)]) as step:
        for done in range(10, 131, 10):
            step("ref", done, 130)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["  ref: 50", "  ref: 100", "  ref: 130"]
    assert "a second, about" in lines[0]
    assert "left" not in lines[-1]


def test_durations_are_readable() -> None:
    assert [span(s) for s in (5, 600, 10_000)] == ["5 s", "10 min", "2.8 h"]
