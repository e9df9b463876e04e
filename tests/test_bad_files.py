"""Files that cannot be used: one line that names the file or the field and what to do, and exit code 2."""

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Ended, Weighbridge
from fault_server import MODEL, FaultServer, first, refuses, well_formed
from test_bundle import edit, make, saved, swap_arrays, unpacked
from weighbridge.reference import bundle as bundles
from weighbridge.reference.bundle import load_bundle, manifest_digest

CONFIGURATION, UNREACHABLE = 2, 4
HEAD = f'name = "shop"\nbase_url = "https://a.example/v1"\nmodel = "{MODEL}"\n'


def assert_one_line(ended: Ended, *names: str) -> None:
    """Exit code 2, nothing on stdout, and one line that names the thing and, as a second sentence, a remedy."""
    assert ended.code == CONFIGURATION, ended.err
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert [name for name in names if name not in lines[0]] == [], lines[0]
    remedy = lines[0].rpartition(". ")[2]
    assert remedy[:1].isupper(), "a remedy is a sentence of its own"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weighbridge.collect.FIRST_WAIT_S", 0.001)


# -- endpoint files --------------------------------------------------------------------------------------------

ENDPOINTS: dict[str, tuple[str, str]] = {
    "unknown field": (HEAD + 'colour = "red"\n', "unknown field colour"),
    "unknown field of a table": (HEAD + "[limits]\nmax_request = 3\n", "limits.max_request"),
    "wrong type": (HEAD + 'identify_client = "perhaps"\n', "identify_client"),
    "wrong type of a table": (HEAD + "limits = 3\n", "limits"),
    "wrong type of a number": (HEAD + '[limits]\nmax_requests = "many"\n', "limits.max_requests"),
    "missing name": (HEAD.replace("name", "# name", 1), "name"),
    "missing base_url": (HEAD.replace("base_url", "# base_url"), "base_url"),
    "missing model": (HEAD.replace("model", "# model"), "model"),
    "empty": ("", "name"),
    "not TOML": ("name = \n", "is not TOML"),
    "JSON": ('{"name": "shop"}', "is not TOML"),
    "not UTF-8": ("latin", "cannot be read"),
    "http to another host": (HEAD.replace("https://a.example", "http://a.example"), "must use https"),
    "http to a host that begins like loopback": (HEAD.replace("https://a.example", "http://127.0.0.1.evil.example"), "must use https"),
    "file URL": (HEAD.replace("https://a.example/v1", "file:///etc/passwd"), "base_url"),
    "no URL": (HEAD.replace("https://a.example/v1", "a.example"), "base_url"),
    "URL with credentials": (HEAD.replace("https://", "https://me:secret@"), "must not hold credentials"),
    "URL with a user": (HEAD.replace("https://", "https://me@"), "must not hold credentials"),
    "URL with a query string": (HEAD.replace("/v1", "/v1?key=secret"), "query string"),
    "URL with a fragment": (HEAD.replace("/v1", "/v1#x"), "fragment"),
    "URL with a broken host": (HEAD.replace("a.example", "[::1"), "base_url"),
    "URL with a port out of range": (HEAD.replace("a.example", "a.example:99999"), "base_url"),
    "URL with a port that is no number": (HEAD.replace("a.example", "a.example:eighty"), "base_url"),
    "URL with a control character": (HEAD.replace("a.example/v1", "a.example/\\u0000v1"), "base_url"),
    "budget of zero": (HEAD + "[limits]\nmax_requests = 0\n", "limits.max_requests"),
    "negative budget": (HEAD + "[limits]\nmax_requests = -1\n", "limits.max_requests"),
    "cost without a price": (HEAD + "[limits]\nmax_cost_usd = 1.0\n", "max_cost_usd"),
    "cost of zero": (HEAD + "[limits]\nmax_cost_usd = 0\n", "limits.max_cost_usd"),
    "cost that is no number": (HEAD + "[limits]\nmax_cost_usd = nan\n", "limits.max_cost_usd"),
    "negative price": (HEAD + "[price]\nprompt_usd_per_million_tokens = -1\ncompletion_usd_per_million_tokens = 1\n", "price.prompt_usd"),
    "half a price": (HEAD + "[price]\nprompt_usd_per_million_tokens = 1\n", "price.completion_usd_per_million_tokens"),
    "timeout of zero": (HEAD + "[limits]\ntimeout_s = 0\n", "limits.timeout_s"),
    "endless timeout": (HEAD + "[limits]\ntimeout_s = inf\n", "limits.timeout_s"),
    "concurrency of zero": (HEAD + "[limits]\nconcurrency = 0\n", "limits.concurrency"),
    "unknown dialect": (HEAD + 'dialect = "morse"\n', "dialect"),
    "another schema": (HEAD + 'schema = "weighbridge/endpoint/9"\n', "schema"),
    "unknown policy": (HEAD + 'policy = "lenient"\n', "'lenient'"),
    "policy file that is not there": (HEAD + 'policy = "nowhere.toml"\n', "nowhere.toml"),
    "unknown reference": (HEAD + 'reference = "gpt-nowhere"\n', "'gpt-nowhere'"),
    "name that is no key's": (HEAD + 'api_key_env = "HOME"\n', "'HOME'"),
    "body with a number that JSON lacks": (HEAD + "[extra_body]\nx = nan\n", "extra_body"),
    "body with a date": (HEAD + "[extra_body]\nx = 2020-01-01\n", "extra_body"),
}  # fmt: skip


# A plan needs no key, and the doctor no reference.
NOT_ASKED = {("plan", "name that is no key's"), ("doctor", "unknown reference")}


@pytest.mark.parametrize(
    ("command", "case"),
    [(c, case) for c in ("audit", "plan", "doctor") for case in ENDPOINTS if (c, case) not in NOT_ASKED],
)
def test_endpoint_file_that_cannot_be_used(
    case: str, command: str, weighbridge_cli: Weighbridge, tmp_path: Path, run: Path
) -> None:
    text, named = ENDPOINTS[case]
    file = tmp_path / "ENDPOINT.toml"
    file.write_bytes(b"name = '\xff'" if text == "latin" else text.encode())
    ended = weighbridge_cli(command, file, *(["--out", run] if command == "audit" else []))
    in_file = "policy" not in case and "reference" not in case and "key" not in case
    assert_one_line(ended, named, *([str(file)] if in_file else []))
    assert "secret" not in ended.err, "credentials are not repeated"
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "no endpoint was named"),
        (["nowhere.toml"], "nowhere.toml"),
        (["."], "cannot be read"),
        (["--base-url", "https://a.example/v1"], "no endpoint was named"),
        (["--base-url", "https://a.example/v1", "--model", ""], "the command line"),
        (["--base-url", "http://a.example/v1", "--model", MODEL], "base_url"),
        (["--base-url", "https://a.example/v1", "--model", MODEL, "--max-requests", "0"], "max_requests"),
        (["--base-url", "https://a.example/v1", "--model", MODEL, "--max-cost", "1"], "max_cost_usd"),
        (["--base-url", "https://a.example/v1", "--model", MODEL, "--policy", "../strict"], "'../strict'"),
        (["--base-url", "https://a.example/v1", "--model", MODEL, "--reference", "/nowhere"], "'/nowhere'"),
    ],
)
def test_options_that_cannot_be_used(options: list[str], named: str, weighbridge_cli: Weighbridge) -> None:
    assert_one_line(weighbridge_cli("audit", *options), named)


# -- policies --------------------------------------------------------------------------------------------------

POLICIES: dict[str, tuple[Callable[[str], str], str]] = {
    "unknown field": (lambda text: f"lenient = true\n{text}", "unknown field lenient"),
    "missing field": (lambda text: text.replace("score_cap", "# score_cap"), "score_cap"),
    "wrong type": (lambda text: re.sub(r"(?m)^version = \d+", 'version = "one"', text), "version"),
    "unknown axis": (lambda text: text.replace('"route"', '"colour"'), "requires"),
    "evidence of nothing": (lambda text: text.replace("differs_e_value = 1000.0", "differs_e_value = 1.0"), "differs_e_value"),
    "not TOML": (lambda text: text + "=", "is not TOML"),
    "another schema": (lambda text: text.replace("policy/1", "policy/2"), "schema"),
}  # fmt: skip


@pytest.mark.parametrize("case", POLICIES)
def test_policy_file_that_cannot_be_used(case: str, weighbridge_cli: Weighbridge, tmp_path: Path) -> None:
    change, named = POLICIES[case]
    strict = Path(bundles.__file__).parent.parent / "policies" / "strict.toml"
    changed = change(strict.read_text("utf-8"))
    assert changed != strict.read_text("utf-8")
    file = tmp_path / "own.toml"
    file.write_text(changed, "utf-8")
    where = ("--base-url", "https://a.example/v1", "--model", MODEL)
    assert_one_line(weighbridge_cli("audit", *where, "--policy", file), str(file), named)


# -- bundles ---------------------------------------------------------------------------------------------------
# What a bundle's arrays and manifest may not hold stands in test_bundle.py; here: what a command makes of it.


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle, to be broken."""
    return make(tmp_path / "bundle")


def change_manifest(bundle: Path, **fields: object) -> None:
    edit(bundle, lambda document: document.update(fields))


def change_pool(bundle: Path, **fields: object) -> None:
    edit(bundle, lambda document: document["pools"][0].update(fields))


def replace_arrays(bundle: Path, **arrays: np.ndarray[Any, Any]) -> None:
    """Other arrays, with the hash in the manifest made to match."""
    swap_arrays(bundle, saved(unpacked(bundle) | arrays))


def flip_a_byte(bundle: Path) -> None:
    arrays = bundle / "arrays.npz"
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)


def no_arrays(bundle: Path) -> None:
    (bundle / "arrays.npz").unlink()


def no_licence(bundle: Path) -> None:
    (bundle / "licence.txt").unlink()


def manifest_that_is_no_json(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{", "utf-8")


def manifest_of_the_first_version(bundle: Path) -> None:
    change_manifest(bundle, schema="weighbridge/bundle/1")


def manifest_of_another_pool(bundle: Path) -> None:
    change_pool(bundle, sha256="0" * 64)


def manifest_of_another_version_of_the_pool(bundle: Path) -> None:
    change_pool(bundle, version=2)


def manifest_of_a_pool_that_is_not_there(bundle: Path) -> None:
    change_pool(bundle, id="nowhere")
    edit(bundle, lambda document: [stack.update(pools=["nowhere"]) for stack in document["stacks"]])


def manifest_with_probes_that_the_pool_lacks(bundle: Path) -> None:
    edit(bundle, lambda document: document.update(probe_ids=[f"nowhere-{p}" for p in document["probe_ids"]]))


def pool_that_is_no_toml(bundle: Path) -> None:
    (bundle / "pools" / "small" / "pool.toml").write_text("x = " + "[" * 100_000, "utf-8")


def pool_with_a_line_that_is_no_json(bundle: Path) -> None:
    (bundle / "pools" / "small" / "probes.jsonl").write_text("[" * 200_000, "utf-8")


def arrays_without_a_number(bundle: Path) -> None:
    replace_arrays(bundle, logprobs_nats=np.full_like(unpacked(bundle)["logprobs_nats"], np.nan))


def arrays_without_a_vocabulary(bundle: Path) -> None:
    replace_arrays(bundle, vocabulary_offsets=np.zeros(1, np.int64), vocabulary_bytes=np.zeros(0, np.uint8))


def arrays_without_any_offset(bundle: Path) -> None:
    replace_arrays(bundle, vocabulary_offsets=np.zeros(0, np.int64))


def arrays_without_rows(bundle: Path) -> None:
    arrays = unpacked(bundle)
    none = {name: arrays[name][:0] for name in ("row_probe", "row_position", "token_ids")}
    replace_arrays(bundle, **none, logprobs_nats=arrays["logprobs_nats"][:, :0])


def arrays_of_another_byte_order(bundle: Path) -> None:
    replace_arrays(bundle, row_probe=unpacked(bundle)["row_probe"].astype(">i4"))


def arrays_that_cannot_be_unpacked(bundle: Path) -> None:
    """Bytes inside the packed data are wrong, and the hash matches."""
    file = bundle / "arrays.npz"
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.compress_size)
    content = bytearray(file.read_bytes())
    middle = largest.header_offset + largest.compress_size // 2
    content[middle : middle + 64] = b"\xff" * 64
    swap_arrays(bundle, bytes(content))


def arrays_packed_in_an_unknown_way(bundle: Path) -> None:
    content = bytearray((bundle / "arrays.npz").read_bytes())
    local, central = content.find(b"PK\x03\x04"), content.find(b"PK\x01\x02")
    content[local + 8 : local + 10] = content[central + 10 : central + 12] = b"\x63\x00"
    swap_arrays(bundle, bytes(content))


def arrays_with_a_password(bundle: Path) -> None:
    content = bytearray((bundle / "arrays.npz").read_bytes())
    local, central = content.find(b"PK\x03\x04"), content.find(b"PK\x01\x02")
    content[local + 6] |= 1
    content[central + 8] |= 1
    swap_arrays(bundle, bytes(content))


BROKEN_BUNDLES: dict[Callable[[Path], None], str] = {
    flip_a_byte: "arrays.npz does not have the hash",
    no_arrays: "lacks arrays.npz",
    no_licence: "licence.txt",
    manifest_that_is_no_json: "manifest.json is not JSON",
    manifest_of_the_first_version: "manifest.json: field schema",
    manifest_of_another_pool: "the pool small",
    manifest_of_another_version_of_the_pool: "the pool small",
    manifest_of_a_pool_that_is_not_there: "'nowhere'",
    manifest_with_probes_that_the_pool_lacks: "nowhere-",
    pool_that_is_no_toml: "pool.toml is not TOML",
    pool_with_a_line_that_is_no_json: "probes.jsonl, line 1: not JSON",
    arrays_without_a_number: "no probe that every stack has answered",
    arrays_without_a_vocabulary: "vocabulary",
    arrays_without_any_offset: "vocabulary",
    arrays_without_rows: "a probe has no row",
    arrays_of_another_byte_order: "row_probe is >i4",
    arrays_that_cannot_be_unpacked: "arrays.npz cannot be read",
    arrays_packed_in_an_unknown_way: "arrays.npz cannot be read",
    arrays_with_a_password: "arrays.npz cannot be read",
}


def assert_refused_before_anything_is_sent(bundle: Path, names: str, weighbridge_cli: Weighbridge, run: Path) -> None:
    with FaultServer(refuses(401, "no")) as server:
        where = ("--base-url", server.base_url, "--model", MODEL, "--reference", bundle)
        ended = weighbridge_cli("audit", *where, "--out", run)
        assert server.requests == []
        assert_one_line(weighbridge_cli("plan", *where), names)
    assert_one_line(ended, names)
    assert not run.exists()


@pytest.mark.parametrize("breaks", BROKEN_BUNDLES)
def test_bundle_that_cannot_be_used(
    breaks: Callable[[Path], None], bundle: Path, weighbridge_cli: Weighbridge, run: Path
) -> None:
    breaks(bundle)
    assert_refused_before_anything_is_sent(bundle, BROKEN_BUNDLES[breaks], weighbridge_cli, run)


@pytest.mark.parametrize("breaks", BROKEN_BUNDLES)
def test_bundle_that_cannot_be_used_is_not_verified(
    breaks: Callable[[Path], None], bundle: Path, weighbridge_cli: Weighbridge
) -> None:
    breaks(bundle)
    assert_one_line(weighbridge_cli("reference", "verify", bundle), BROKEN_BUNDLES[breaks])


ELSEWHERE: dict[str, Any] = {"pools": []}
PARTS: dict[str, tuple[list[str], dict[str, dict[str, Any]], str]] = {
    "the reference alone": (["ref"], {}, "an honest stack beside the reference is needed"),
    "no honest stack beside the reference": (["ref", "int8"], {}, "an honest stack beside the reference is needed"),
    "no departure": (["ref", "honest"], {}, "a departure is needed"),
    "wrong prompts only": (["ref", "honest", "int8"], {"int8": {"departure": "template"}}, "a departure is needed"),
    "an honest stack that was asked nothing": (["ref", "honest", "int8"], {"honest": ELSEWHERE}, "an honest stack beside"),
    "a departure that was asked nothing": (["ref", "honest", "int8"], {"int8": ELSEWHERE}, "a departure is needed"),
    "a reference that was asked nothing": (["ref", "honest", "int8"], {"ref": ELSEWHERE}, "the reference stack is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_a_part_of_a_bundle_is_whole_but_nothing_is_judged_against_it(
    case: str, tmp_path: Path, weighbridge_cli: Weighbridge, run: Path
) -> None:
    stacks, records, why = PARTS[case]
    part = make(tmp_path / "part", stacks, records=records)
    assert weighbridge_cli("reference", "verify", part).code == 0
    assert why in weighbridge_cli("reference", "show", part).said
    names = f"the bundle small cannot be judged against: {why}"
    assert_refused_before_anything_is_sent(part, names, weighbridge_cli, run)


def test_without_a_one_token_pool_nothing_is_judged(bundle: Path, weighbridge_cli: Weighbridge, run: Path) -> None:
    change_pool(bundle, level="L5")
    assert_refused_before_anything_is_sent(bundle, "it holds no one-token pool", weighbridge_cli, run)


def test_manifest_of_too_many_bytes_is_refused(
    bundle: Path, weighbridge_cli: Weighbridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weighbridge.reference.bundle.MAX_MANIFEST_BYTES", 1000)
    assert_one_line(weighbridge_cli("reference", "verify", bundle), "manifest.json is larger")


@pytest.fixture
def embedded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The copy stands for an embedded bundle that this version pins as it is now."""
    pinned = manifest_digest(load_bundle(str(bundle)).manifest)
    monkeypatch.setattr(bundles, "EMBEDDED", {"pinned": pinned})
    monkeypatch.setattr(bundles, "data_path", lambda relative: bundle if "pinned" in relative else Path(relative))
    return bundle


def test_a_changed_manifest_of_an_embedded_bundle_is_refused(embedded: Path, weighbridge_cli: Weighbridge) -> None:
    assert weighbridge_cli("reference", "verify", "pinned").code == 0
    change_manifest(embedded, keeper="somebody else")
    assert_one_line(weighbridge_cli("reference", "verify", "pinned"), "pinned", "Install Weighbridge again")


def test_an_embedded_bundle_that_the_installation_lacks(
    weighbridge_cli: Weighbridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "EMBEDDED", {"left-out": "0" * 64})
    assert_one_line(weighbridge_cli("reference", "verify", "left-out"), "left-out")


# -- run folders -----------------------------------------------------------------------------------------------


def audit_three_answers(weighbridge_cli: Weighbridge, reference: str | Path, run: Path) -> None:
    """A run of three good answers, then a refusal."""
    with FaultServer(first(3, well_formed, refuses(401, "gone"))) as server:
        where = ("--base-url", server.base_url, "--model", MODEL, "--reference", reference)
        assert weighbridge_cli("audit", *where, "--out", run).code == UNREACHABLE


@pytest.fixture
def finished(
    weighbridge_cli: Weighbridge, reference: str, run: Path, own_home: Path, already_known: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A run folder of one's own that has ended."""
    if "finished" not in already_known:
        audit_three_answers(weighbridge_cli, reference, run)
        already_known["finished"] = tmp_path_factory.mktemp("finished")
        shutil.copytree(run, already_known["finished"] / "run")
        shutil.copytree(own_home, already_known["finished"] / "home")
    else:
        shutil.copytree(already_known["finished"] / "run", run)
        shutil.copytree(already_known["finished"] / "home", own_home)
    return run


@pytest.fixture
def finished_with_bundle(weighbridge_cli: Weighbridge, bundle: Path, run: Path) -> Path:
    """The same with a bundle in a folder."""
    change_manifest(bundle, keeper="a keeper of one's own")
    audit_three_answers(weighbridge_cli, bundle, run)
    return run


def test_an_existing_run_is_not_overwritten(finished: Path, reference: str, weighbridge_cli: Weighbridge) -> None:
    before = {file.name: hashlib.sha256(file.read_bytes()).digest() for file in finished.iterdir()}
    where = ("--base-url", "https://a.example/v1", "--model", MODEL, "--reference", reference)
    assert_one_line(weighbridge_cli("audit", *where, "--out", finished), str(finished), "weighbridge resume")
    assert {file.name: hashlib.sha256(file.read_bytes()).digest() for file in finished.iterdir()} == before


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_is_no_run_folder(below: str, bundle: Path, tmp_path: Path, weighbridge_cli: Weighbridge) -> None:
    file = tmp_path / "file"
    file.write_text("mine", "utf-8")
    where = ("--base-url", "https://a.example/v1", "--model", MODEL, "--reference", bundle)
    assert_one_line(weighbridge_cli("audit", *where, "--out", file / below), str(file))
    assert file.read_text("utf-8") == "mine"


@pytest.mark.parametrize("command", ["replay", "resume"])
@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_that_is_no_run(folder: str, command: str, tmp_path: Path, weighbridge_cli: Weighbridge) -> None:
    path = tmp_path / folder
    assert_one_line(weighbridge_cli(command, path), str(path), "plan.json")


PLANS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "not JSON": lambda plan: plan[:-40],
    "a list": lambda _: b"[]",
    "unknown field": lambda plan: plan.replace(b'"run_id"', b'"extra": 1, "run_id"'),
    "not UTF-8": lambda plan: plan.replace(b'"run_id": "', b'"run_id": "\xff'),
    "another schema": lambda plan: plan.replace(b"weighbridge/plan/1", b"weighbridge/plan/2"),
    "nested without end": lambda _: b"[" * 200_000,
}


@pytest.mark.parametrize("command", ["replay", "resume"])
@pytest.mark.parametrize("case", PLANS)
def test_plan_that_cannot_be_read(case: str, command: str, finished: Path, weighbridge_cli: Weighbridge) -> None:
    plan = finished / "plan.json"
    plan.write_bytes(PLANS[case](plan.read_bytes()))
    assert_one_line(weighbridge_cli(command, finished), str(plan))


def received(**fields: object) -> bytes:
    """A line that says what came back for the first request, in some other way."""
    line = {
        "event": "received",
        "request_id": "capability-top-20",
        "attempt": 1,
        "status": 200,
        "headers": {},
        "latency_s": 0.1,
    }
    return json.dumps({name: value for name, value in (line | fields).items() if value is not ...}).encode()  # fmt: skip


LINES: dict[str, bytes] = {
    "not JSON": b'{"event": "received"',
    "empty line": b"",
    "not UTF-8": b'{"event": "\xff"}',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "unknown event": b'{"event": "invented"}',
    "unknown field": received(colour="red"),
    "missing field": received(latency_s=...),
    "wrong type": received(status="fine"),
    "infinite time": received(latency_s=1).replace(b'"latency_s": 1', b'"latency_s": Infinity'),
    "body that is no base64": received(body_base64="abcde"),
    "nested without end": b"[" * 200_000,
}


@pytest.mark.parametrize("command", ["replay", "resume"])
@pytest.mark.parametrize("case", LINES)
def test_exchanges_that_cannot_be_read(case: str, command: str, finished: Path, weighbridge_cli: Weighbridge) -> None:
    log = finished / "exchanges.jsonl"
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"".join(line + b"\n" for line in [lines[0], LINES[case], *lines[2:]]))
    before = log.read_bytes()
    assert_one_line(weighbridge_cli(command, finished), f"{log}, line 2")
    assert log.read_bytes() == before


def test_a_line_that_a_crash_cut_short_is_left_out(finished: Path, weighbridge_cli: Weighbridge) -> None:
    log = finished / "exchanges.jsonl"
    log.write_bytes(log.read_bytes() + b'{"event": "sent", "requ')
    ended = weighbridge_cli("replay", finished)
    assert ended.code == UNREACHABLE, ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("command", ["replay", "resume"])
def test_a_run_is_not_judged_with_another_bundle(
    command: str, finished_with_bundle: Path, bundle: Path, weighbridge_cli: Weighbridge
) -> None:
    change_manifest(bundle, keeper="somebody else")
    assert_one_line(
        weighbridge_cli(command, finished_with_bundle), "is not the one that this run was planned with", "--reference"
    )


@pytest.mark.parametrize("command", ["replay", "resume"])
def test_a_run_whose_bundle_is_gone(
    command: str, finished_with_bundle: Path, bundle: Path, weighbridge_cli: Weighbridge
) -> None:
    shutil.rmtree(bundle)
    assert_one_line(weighbridge_cli(command, finished_with_bundle), str(bundle))
