"""Publishing, verifying and disputing: what is entered is entered once, and whatever is changed afterwards is seen.

A fake server answers here: these are forms and faults, and nothing is detected. What `verify` cannot see, and no test here claims:

- A log that was rolled back whole. An earlier log with its own signed head is as whole as it was then; only who kept a later head, or a
  report that is not in it, notices.
- A publisher who recorded or re-signed something else from the start: a signature binds the signer, not the endpoint.
- Whether the day was right as of which pages call a report old: it is read from index.json.
- Verdicts of a fleet judged together: what the audit says alone is judged again, what the night says is only in the signed log.
- What another version judged: it is said to be not judged again (exit 3), never to be right.
- Speed and errors in the log: they are shown and never judged.
"""

import base64
import io
import json
import os
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest

import weighbridge.plan
from conftest import REFERENCE, Ended, Weighbridge
from fault_server import MODEL, Call, FaultServer, completion, well_formed
from test_nightly import KEY, no_space, table, write_fleet
from weighbridge.attest import TrustedKey, new_key, sign_statement, statement_bytes, unsigned
from weighbridge.canonical import canonical_bytes, sha256_hex, write_atomically
from weighbridge.dialects.routes import route_requests
from weighbridge.paths import data_path
from weighbridge.publish import enter
from weighbridge.publish.enter import _is_sealed, _State
from weighbridge.publish.entries import FIRST
from weighbridge.publish.evidence import NAMES, REPORT_TYPE, STATEMENT, seal
from weighbridge.publish.log import HEAD, HEAD_TYPE, LOG, Appending, read_log
from weighbridge.reference.bundle import load_bundle
from weighbridge.store import RunFolder

WHOLE, OTHERWISE, CHANGED, UNKNOWN = range(4)
A_FAULT_OF_OURS = 70
EVENING = datetime(2026, 11, 22, 22, tzinfo=UTC)
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
NIGHT = "2026-11-22"
PLAIN, ROUTED, FAR = "plain-host", "routed-host", "far-host"
ACCOUNT = "org-account-of-the-auditor"
FINE_TUNE = "a-private-fine-tune"
# Steers a terminal, and is not among what click takes out by itself.
STEERING = "\x1b]0;title\x07\x9b2J\u202e"

Change = Callable[[list[dict[str, Any]]], object]


# -- runs and sites --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(weights_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weighbridge.collect.FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("weighbridge.audit.RECORD_WAIT_S", 0.001)
    monkeypatch.setattr("weighbridge.cli.nightly.datetime", SimpleNamespace(now=lambda _: EVENING))
    it_is(monkeypatch, NOON)


def it_is(monkeypatch: pytest.MonkeyPatch, moment: datetime) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(moment.timestamp())))


def answers(call: Call) -> None:
    """As `well_formed`; a listing and a router's records say something of the account of who asked."""
    path = call.request.path
    if path == "/v1/models":
        call.send_json(200, {"account": ACCOUNT, "data": [{"id": MODEL}, {"id": FINE_TUNE, "owned_by": ACCOUNT}]})
    elif path.endswith("/endpoints"):
        call.send_json(200, {"data": {"id": "an-author/a-model", "endpoints": []}})
    elif "/generation?" in path:
        record = {"id": "x", "provider_name": "half a pair \ud800", "user": ACCOUNT, "external_user": ACCOUNT}
        call.send_json(200, {"data": record})
    else:
        well_formed(call)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is made once for all tests: runs, a signed site, keys."""
    folder = tmp_path_factory.mktemp("kept")
    new_key(folder / "auditor", "An Auditor")
    new_key(folder / "stranger", "A Stranger")
    return folder


@pytest.fixture
def key(kept: Path) -> Path:
    return kept / "auditor"


@pytest.fixture
def stranger(kept: Path) -> Path:
    return kept / "stranger"


@pytest.fixture
def root(kept: Path, weighbridge_cli: Weighbridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of three judged runs: without a reference, through a router, and with the embedded one."""
    if not (kept / "runs").exists():
        with pytest.MonkeyPatch.context() as patch, FaultServer(answers) as server:
            patch.setattr(weighbridge.plan, "route_requests", route_requests)
            patch.setenv("SHOP_API_KEY", KEY)
            limits = {"limits": {"max_requests": 30}}
            fleet = write_fleet(
                kept,
                table("Plain host", server.base_url, api_key_env="SHOP_API_KEY", **limits),
                table(
                    "Routed host", server.base_url, **limits | {"router": "openrouter", "model": "an-author/a-model"}
                ),
                table("Far host", server.base_url, reference=REFERENCE, **limits),
            )
            ended = weighbridge_cli("nightly", fleet, "--out", kept / "runs")
            assert ended.code in (WHOLE, OTHERWISE, UNKNOWN), ended.said
    shutil.copytree(kept / "runs", tmp_path / "runs")
    return tmp_path / "runs"


Publish = Callable[..., Ended]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def publish(weighbridge_cli: Weighbridge, root: Path, site: Path) -> Publish:
    """`weighbridge publish` without notice, unless another one is given."""
    return lambda *options, out=site, runs=root: weighbridge_cli(
        "publish", "--runs", runs, "--out", out, "--notice-days", 0, *options
    )


@pytest.fixture
def signed(kept: Path, publish: Publish, key: Path, site: Path) -> Path:
    """A copy of a site that was signed."""
    if not (kept / "site").exists():
        ended = publish("--key", key, out=kept / "site")
        assert ended.code == WHOLE, ended.said
    shutil.copytree(kept / "site", site)
    return site


@pytest.fixture
def verify(weighbridge_cli: Weighbridge, kept: Path) -> Callable[..., Ended]:
    """`weighbridge verify` by who trusts the auditor's key; whatever it is given, it ends as it should."""

    def run(path: Path, *options: object, trusted: str | None = "auditor") -> Ended:
        trust = ["--trusted-key", kept / f"{trusted}.pub"] if trusted is not None else []
        ended = weighbridge_cli("verify", path, *trust, *options)
        assert ended.code in (WHOLE, OTHERWISE, CHANGED, UNKNOWN), ended.said
        assert "Traceback" not in ended.err
        if ended.code == CHANGED and not ended.out:
            assert len(ended.err.splitlines()) == 1
        return ended

    return run


def said_json(ended: Ended) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(ended.out)
    return document


def report_of(site: Path, slug: str = PLAIN) -> Path:
    """The folder of an endpoint's only report."""
    (folder,) = (site / "reports" / slug).iterdir()
    return folder


def unpacked(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def resealed(files: dict[str, bytes], key_file: Path | None, **predicate: object) -> bytes:
    """Evidence with a fresh statement of whatever it holds."""
    files = {name: data for name, data in files.items() if name != STATEMENT}
    payload = statement_bytes({name: sha256_hex(data) for name, data in files.items()}, REPORT_TYPE, predicate)
    envelope = unsigned(payload) if key_file is None else sign_statement(payload, key_file)
    return packed({**files, STATEMENT: json.dumps(envelope).encode()})


def lines_of(site: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (site / LOG).read_text("utf-8").splitlines()]


def rewrite_log(site: Path, key_file: Path | None, change: Change) -> None:
    """Change the log and bind it anew, each line to the one before and the whole to its head, as only its signer can."""
    lines = lines_of(site)
    change(lines)
    previous, data = FIRST, b""
    for index, line in enumerate(lines):
        text = canonical_bytes(line | {"index": index, "previous": previous})
        previous, data = sha256_hex(text), data + text + b"\n"
    (site / LOG).write_bytes(data)
    payload = statement_bytes({LOG: sha256_hex(data)}, HEAD_TYPE, {"entries": len(lines), "head": previous})
    envelope = unsigned(payload) if key_file is None else sign_statement(payload, key_file)
    (site / HEAD).write_bytes(canonical_bytes(envelope))


def reports_in(site: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(site) if line["kind"] == "report"]


def reseal_in_site(site: Path, slug: str, key_file: Path | None, **changed: bytes) -> Path:
    """Put other files into a report's evidence, and everything that binds it anew: evidence, page, log, head."""
    old = report_of(site, slug)
    files = unpacked(old / "evidence.zip") | {name.replace("__", "."): data for name, data in changed.items()}
    data = resealed(files, key_file)
    new = old.with_name(f"{NIGHT}-{sha256_hex(data)[:12]}")
    old.rename(new)
    (new / "evidence.zip").write_bytes(data)

    def named(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line.get("slug") == slug:
                line["evidence_sha256"] = sha256_hex(data)

    rewrite_log(site, key_file, named)
    return new


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def everything_in(folder: Path) -> bytes:
    """All bytes of a folder's files and their names, archives unpacked."""
    parts = []
    for name, data in tree(folder).items():
        parts += [name.encode(), data]
        if name.endswith(".zip"):
            files = unpacked(folder / name)
            parts += files.values()
            payload = json.loads(files[STATEMENT])["payload"] if STATEMENT in files else ""
            parts.append(base64.b64decode(payload))
    return b"\n".join(parts)


def edit(file: Path, **changed: object) -> None:
    """Change fields of a JSON file, its time included as the clock has it."""
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changed), "utf-8")
    for index in file.parent.parent.parent.glob("history.sqlite*"):
        index.unlink()


def say_instead(run: Path, verdict: str, cause: str | None = None) -> None:
    """Another word for a run: the form is tested, not the judgement."""
    edit(run / "verdict.json", verdict=verdict, cause=cause)
    edit(run / "row.json", verdict=verdict, cause=cause)
    of_no_night(run)


def of_no_night(run: Path) -> None:
    """A run that was judged alone: what a fleet's night says of it is another matter."""
    for name in ("fleet.json", "night.json"):
        (run.parent / name).unlink(missing_ok=True)


def one_byte_changed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# -- what is whole ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", [PLAIN, ROUTED, FAR])
def test_a_published_report_is_whole_trusted_and_judged_to_the_same_bytes(
    slug: str, signed: Path, verify: Callable[..., Ended]
) -> None:
    ended = verify(report_of(signed, slug) / "evidence.zip", "--json")
    found = said_json(ended)
    assert ended.code == WHOLE, ended.said
    assert (found["judged_again"], found["signature"]["state"], found["log_signature"]["state"]) == (
        "same", "trusted", "trusted",
    )  # fmt: skip
    assert found["log_index"] is not None


def test_a_whole_site_is_as_its_log_says(signed: Path, verify: Callable[..., Ended]) -> None:
    ended = verify(signed)
    assert ended.code == WHOLE
    assert "3 reports, 32 pages and documents: as the log says; signed by An Auditor" in ended.said


def test_every_page_and_document_that_was_changed_is_named(
    signed: Path, weighbridge_cli: Weighbridge, verify: Callable[..., Ended]
) -> None:
    """They are made again from log and evidence; the key beside them is none that a reader trusts."""
    own = {
        p for p in signed.rglob("*") if p.is_file() and p.relative_to(signed).parts[0] not in ("reports", "references", LOG, HEAD)
    }  # fmt: skip
    assert len(own) == 32
    for path in sorted(own):
        data = path.read_bytes()
        path.write_bytes(one_byte_changed(data))
        ended = verify(signed)
        assert (ended.code, path.name in ended.said) == (CHANGED, True), path
        path.write_bytes(data)
    assert verify(signed).code == WHOLE


def test_who_is_not_trusted_is_named_and_is_no_success(
    signed: Path, verify: Callable[..., Ended], key: Path, kept: Path
) -> None:
    keyid = json.loads((signed / "index.json").read_bytes())["signer"]["keyid"]
    for path in (signed, report_of(signed)):
        for trusted in (None, "stranger"):
            ended = verify(path, trusted=trusted)
            assert ended.code == UNKNOWN
            assert f"signed by someone unknown ({keyid})" in ended.said


def test_a_report_by_itself_needs_no_log(signed: Path, verify: Callable[..., Ended], tmp_path: Path) -> None:
    alone = tmp_path / "alone.zip"
    shutil.copy(report_of(signed) / "evidence.zip", alone)
    assert verify(alone).code == WHOLE
    assert verify(alone, "--log", signed / LOG).code == WHOLE


@pytest.mark.parametrize("of", [".", f"reports/{PLAIN}", "report", "evidence"])
def test_no_key_of_the_site_vouches_for_the_site(of: str, signed: Path, weighbridge_cli: Weighbridge) -> None:
    report = report_of(signed)
    paths = {"report": report, "evidence": report / "evidence.zip", ".": signed}
    path = paths.get(of, signed / of)
    ended = weighbridge_cli("verify", path, "--trusted-key", signed / "signer.pub")
    assert ended.code == CHANGED
    assert of == f"reports/{PLAIN}" or "stands beside what it is to vouch for" in ended.err


# -- what was changed ------------------------------------------------------------------------------------------


def test_one_changed_byte_in_any_file_is_named(signed: Path, verify: Callable[..., Ended]) -> None:
    for slug in (PLAIN, FAR):
        archive = report_of(signed, slug) / "evidence.zip"
        files = unpacked(archive)
        assert {"plan.json", "exchanges.jsonl", "verdict.json", "findings.json", "report.html"} < files.keys()
        for name in files.keys() - {STATEMENT}:
            archive.write_bytes(packed(files | {name: one_byte_changed(files[name])}))
            ended = verify(archive)
            assert ended.code == CHANGED
            assert f"{name} was changed" in ended.err, name


def test_one_changed_byte_anywhere_in_the_archive_is_seen(signed: Path, verify: Callable[..., Ended]) -> None:
    archive = report_of(signed) / "evidence.zip"
    data = archive.read_bytes()
    for place in range(0, len(data), len(data) // 60):
        archive.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        assert verify(archive).code == CHANGED, place
        assert verify(signed).code == CHANGED, place


@pytest.mark.parametrize("name", sorted(["plan.json", "exchanges.jsonl", "report.html", STATEMENT]))
def test_a_file_that_is_gone_or_added_or_renamed_is_named(
    name: str, signed: Path, verify: Callable[..., Ended]
) -> None:
    archive = report_of(signed) / "evidence.zip"
    files = unpacked(archive)
    archive.write_bytes(packed({n: d for n, d in files.items() if n != name}))
    ended = verify(archive)
    assert (ended.code, name in ended.err) == (CHANGED, True)
    archive.write_bytes(packed({(f"{n}.old" if n == name else n): d for n, d in files.items()}))
    ended = verify(archive)
    assert (ended.code, f"{name}.old" in ended.err) == (CHANGED, True)


def test_what_was_added_is_named(signed: Path, verify: Callable[..., Ended]) -> None:
    archive = report_of(signed) / "evidence.zip"
    files = unpacked(archive)
    for name in ("controls/honest/plan.json", "reference.json"):
        archive.write_bytes(packed(files | {name: b"{}"}))
        ended = verify(archive)
        assert (ended.code, f"{name} was added" in ended.err) == (CHANGED, True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_stands_twice_is_named(signed: Path, verify: Callable[..., Ended]) -> None:
    archive = report_of(signed) / "evidence.zip"
    for again in (unpacked(archive)["verdict.json"], b"{}"):
        data = archive.read_bytes()
        with zipfile.ZipFile(archive, "a") as opened:
            opened.writestr("verdict.json", again)
        ended = verify(archive)
        assert (ended.code, "'verdict.json'" in ended.err) == (CHANGED, True)
        archive.write_bytes(data)


def test_a_changed_statement_or_signature_is_the_signers_no_more(signed: Path, verify: Callable[..., Ended]) -> None:
    archive = report_of(signed) / "evidence.zip"
    files = unpacked(archive)
    envelope = json.loads(files[STATEMENT])
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["verdict"] = "consistent"
    payload = base64.b64encode(canonical_bytes(statement)).decode()
    (signature,) = envelope["signatures"]
    wrong = base64.b64encode(one_byte_changed(base64.b64decode(signature["sig"]))).decode()
    for changed in ({"payload": payload}, {"signatures": [signature | {"sig": wrong}]}):
        archive.write_bytes(packed(files | {STATEMENT: json.dumps(envelope | changed).encode()}))
        ended = verify(archive)
        assert ended.code == CHANGED
        assert "the signature by An Auditor" in ended.err
        assert "is wrong" in ended.err


def test_a_signature_that_was_taken_off_makes_it_unsigned_and_no_report_of_the_log(
    signed: Path, verify: Callable[..., Ended], tmp_path: Path
) -> None:
    archive = report_of(signed) / "evidence.zip"
    files = unpacked(archive)
    envelope = json.loads(files[STATEMENT]) | {"signatures": []}
    archive.write_bytes(packed(files | {STATEMENT: json.dumps(envelope).encode()}))
    ended = verify(archive)
    assert (ended.code, "is not in" in ended.err) == (CHANGED, True)
    alone = tmp_path / "alone.zip"
    shutil.copy(archive, alone)
    ended = verify(alone)
    assert (ended.code, "unsigned" in ended.out) == (UNKNOWN, True)


def test_what_a_stranger_sealed_anew_is_of_someone_unknown_and_not_in_the_log(
    signed: Path, verify: Callable[..., Ended], stranger: Path, tmp_path: Path
) -> None:
    archive = report_of(signed) / "evidence.zip"
    data = resealed(unpacked(archive), stranger)
    alone = tmp_path / "alone.zip"
    alone.write_bytes(data)
    ended = verify(alone)
    assert (ended.code, "someone unknown" in ended.said) == (UNKNOWN, True)
    archive.write_bytes(data)
    ended = verify(archive)
    assert (ended.code, "no report there has its digest" in ended.err) == (CHANGED, True)
    ended = verify(signed)
    assert (ended.code, str(archive) in ended.out) == (CHANGED, True)


def test_a_page_beside_the_evidence_that_is_another_one_is_seen(signed: Path, verify: Callable[..., Ended]) -> None:
    page = report_of(signed) / "report.html"
    page.write_bytes(one_byte_changed(page.read_bytes()))
    for path in (page.parent, page.with_name("evidence.zip")):
        ended = verify(path)
        assert (ended.code, "is not the page that was sealed" in ended.err) == (CHANGED, True)
    assert str(page) in verify(signed).out
    page.unlink()
    assert verify(signed).code == CHANGED
    page.mkdir()
    assert verify(page.parent).code == CHANGED
    assert verify(signed).code == CHANGED


def test_every_line_of_the_log_is_bound(signed: Path, verify: Callable[..., Ended]) -> None:
    log = signed / LOG
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    changed = [[*lines[:n], one_byte_changed(lines[n]), *lines[n + 1 :]] for n in range(len(lines))]
    changed += [[*lines[:n], *lines[n + 1 :]] for n in range(len(lines))]
    changed += [[*lines[:n], lines[n + 1], lines[n], *lines[n + 2 :]] for n in range(len(lines) - 1)]
    changed += [[*lines[:n], lines[n], *lines[n:]] for n in range(len(lines))]
    changed += [lines[:-1], [*lines[:-1], lines[-1][:-1]], [*lines[:-1], lines[-1][:40]], [], [*lines, b"\n"]]
    changed += [[*lines, b'{"kind": "report"'], [*lines, b"\0" * 100]]
    # No later line binds the last one, and nothing but the head says what was slow.
    last = canonical_bytes(json.loads(lines[-1]) | {"errors": 77}) + b"\n"
    assert last != lines[-1]
    changed.append([*lines[:-1], last])
    for one in changed:
        log.write_bytes(b"".join(one))
        assert verify(signed).code == CHANGED, b"".join(one)[-200:]
        assert verify(report_of(signed)).code == CHANGED, b"".join(one)[-200:]
    log.write_bytes(whole)
    assert verify(signed).code == WHOLE


def test_a_head_that_was_changed_or_is_gone_is_seen(
    signed: Path, verify: Callable[..., Ended], stranger: Path, publish: Publish, key: Path
) -> None:
    head = signed / HEAD
    data = head.read_bytes()
    wrong = json.loads(data)
    wrong["signatures"][0]["sig"] = base64.b64encode(b"0" * 64).decode()
    for bad in (
        json.dumps(wrong).encode(),
        b"",
        b"{}",
        b"[" * 100_000,
        unpacked(report_of(signed) / "evidence.zip")[STATEMENT],
    ):
        head.write_bytes(bad)
        assert verify(signed).code == CHANGED
        assert verify(report_of(signed)).code == CHANGED
    head.unlink()
    assert verify(signed).code == CHANGED
    assert verify(report_of(signed)).code == UNKNOWN, "a log that nobody signed is no trusted one"


def test_a_log_that_was_rolled_back_is_seen_with_the_later_head_or_by_who_holds_a_later_report(
    root: Path, publish: Publish, site: Path, key: Path, verify: Callable[..., Ended]
) -> None:
    """Log and head of the same earlier moment are whole: a reader who kept nothing of later cannot know. See this file's first lines."""
    later = root / NIGHT / FAR
    aside = root.parent / "aside"
    later.rename(aside)
    assert publish("--key", key).code == WHOLE
    earlier = {name: (site / name).read_bytes() for name in (LOG, HEAD)}
    aside.rename(later)
    assert publish("--key", key).code == WHOLE
    assert verify(site).code == WHOLE
    (site / LOG).write_bytes(earlier[LOG])
    ended = verify(site)
    assert (ended.code, "is not the log that was signed" in ended.err) == (CHANGED, True)
    (site / HEAD).write_bytes(earlier[HEAD])
    ended = verify(report_of(site, FAR))
    assert (ended.code, "no report there has its digest" in ended.err) == (CHANGED, True)
    ended = verify(site)
    assert (ended.code, "lacks lines that the pages were made from" in ended.out) == (CHANGED, True)


def test_a_changed_reference_is_named(signed: Path, verify: Callable[..., Ended]) -> None:
    (file,) = (signed / "references").iterdir()
    file.write_bytes(one_byte_changed(file.read_bytes()))
    ended = verify(signed)
    assert (ended.code, str(file) in ended.out) == (CHANGED, True)


SAID_OTHERWISE: dict[str, object] = {
    "verdict": "consistent", "alone": "consistent", "cause": "precision", "sentence": "All is well.", "model": "another",
    "base_url": "https://another.example/v1", "endpoint": "Another host", "night": "2026-11-21", "created_at": "2026-11-20T22:00:00Z",
    "commitment": "0" * 64, "run_id": "0" * 16, "policy": "kv8", "policy_version": 99, "noise_nats": 0.001, "log10_e_value": 99.5,
    "answers_used": 4000, "requests_sent": 4000, "reference": "0" * 64, "pool": "0" * 64, "weighbridge_version": "9.9.9",
    "axes": {"weights": "consistent"}, "exact_variant": "q4_0", "claimed_precision": "bf16", "cost_usd": 12.5,
    "stopped_because": "decided at once",
}  # fmt: skip


def test_a_log_that_says_something_else_than_its_evidence_is_seen(
    root: Path, publish: Publish, site: Path, verify: Callable[..., Ended], key: Path
) -> None:
    """By the right key: what a publisher entered is held against what the publisher sealed."""
    of_no_night(root / NIGHT / PLAIN)
    assert publish("--key", key).code == WHOLE
    signed, before = site, tree(site)
    for field, value in SAID_OTHERWISE.items():

        def change(lines: list[dict[str, Any]], field: str = field, value: object = value) -> None:
            for line in lines:
                if line.get("slug") == PLAIN:
                    assert line[field] != value
                    line[field] = value

        folder = report_of(signed)
        rewrite_log(signed, key, change)
        if field == "night":
            folder.rename(folder.with_name(folder.name.replace(NIGHT, str(value))))
        assert verify(report_of(signed)).code == CHANGED, field
        assert verify(signed).code == CHANGED, field
        shutil.rmtree(signed)
        for name, data in before.items():
            (signed / name).parent.mkdir(parents=True, exist_ok=True)
            (signed / name).write_bytes(data)


def test_an_entry_that_points_at_another_endpoints_report_is_none(
    signed: Path, verify: Callable[..., Ended], key: Path
) -> None:
    def change(lines: list[dict[str, Any]]) -> None:
        first, second = [line for line in lines if line["kind"] == "report"][:2]
        assert first["slug"] != second["slug"]
        second["supersedes"] = first["index"]

    rewrite_log(signed, key, change)
    assert verify(signed).code == CHANGED
    assert verify(report_of(signed)).code == CHANGED


@pytest.mark.parametrize("name", ["verdict.json", "findings.json", "observations.jsonl"])
def test_another_judgement_that_its_signer_sealed_comes_out_otherwise(
    name: str, signed: Path, verify: Callable[..., Ended], key: Path
) -> None:
    files = unpacked(report_of(signed) / "evidence.zip")
    verdict = json.loads(files["verdict.json"])
    changed: dict[str, bytes] = {}
    if name == "verdict.json":
        changed["verdict__json"] = canonical_bytes(verdict | {"error_rate": "None at all."}) + b"\n"
    elif name == "findings.json":
        findings = json.loads(files[name])
        findings["findings"][0]["summary"] = "All is well"
        changed["findings__json"] = canonical_bytes(findings) + b"\n"
    else:
        observations = files[name].replace(b'"status":200', b'"status":201', 1)
        assert observations != files[name]
        changed["observations__jsonl"] = observations
        verdict["observations_sha256"] = sha256_hex(observations)
        changed["verdict__json"] = canonical_bytes(verdict) + b"\n"
    folder = reseal_in_site(signed, PLAIN, key, **changed)
    ended = verify(signed)
    assert (ended.code, "is not what the log and the evidence say" in ended.out) == (CHANGED, True), (
        "pages are of another"
    )
    ended = verify(folder, "--json")
    assert (ended.code, said_json(ended)["judged_again"]) == (OTHERWISE, "other")
    assert name in said_json(ended)["why"]


def test_a_run_that_was_edited_before_it_was_published_is_judged_otherwise(
    root: Path, publish: Publish, site: Path, key: Path, verify: Callable[..., Ended]
) -> None:
    say_instead(root / NIGHT / PLAIN, "differs", "precision")
    assert publish("--key", key).code == WHOLE
    ended = verify(report_of(site))
    assert ended.code == OTHERWISE
    assert "not the same: judged again, verdict.json came out otherwise" in ended.said


def test_a_judgement_of_another_version_is_not_said_to_be_wrong(
    signed: Path, verify: Callable[..., Ended], key: Path
) -> None:
    files = unpacked(report_of(signed) / "evidence.zip")
    verdict = json.loads(files["verdict.json"]) | {"weighbridge_version": "9.9.9"}
    folder = report_of(signed)
    (folder / "evidence.zip").unlink()
    alone = folder.parent.parent.parent.parent / "alone.zip"
    alone.write_bytes(resealed(files | {"verdict.json": canonical_bytes(verdict) + b"\n"}, key))
    ended = verify(alone)
    assert (ended.code, "judged by version 9.9.9" in ended.said) == (UNKNOWN, True)


def test_a_reference_of_another_digest_judges_nothing(
    signed: Path, verify: Callable[..., Ended], tmp_path: Path
) -> None:
    other = other_bundle(tmp_path)
    ended = verify(report_of(signed, FAR), "--reference", other)
    assert (ended.code, "not the one that this run was planned with" in ended.said) == (UNKNOWN, True)


def other_bundle(folder: Path, visibility: str = "public", level: str = "L3") -> Path:
    """The embedded bundle under another keeper, so that its digest and place are its own; the pool of a level says whether it is sealed."""
    bundle = folder / "bundles" / REFERENCE
    shutil.copytree(data_path(f"reference_outputs/{REFERENCE}"), bundle)
    manifest = json.loads((bundle / "manifest.json").read_bytes()) | {"keeper": "another"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / "manifest.sig.json").unlink(missing_ok=True)
    (pool,) = {p["id"] for p in manifest["pools"] if p["level"] == level and p["rendering"] == "official"}
    shutil.copytree(data_path(f"probes/{pool}"), bundle / "pools" / pool)
    description = (bundle / "pools" / pool / "pool.toml").read_text()
    assert 'visibility = "public"' in description
    (bundle / "pools" / pool / "pool.toml").write_text(
        description.replace('visibility = "public"', f'visibility = "{visibility}"')
    )
    return bundle


# -- hostile archives ------------------------------------------------------------------------------------------


def raw_zip(entries: list[tuple[bytes, bytes, dict[str, int]]]) -> bytes:
    """A zip file whose headers say whatever they are told to."""
    body, central = bytearray(), bytearray()
    for name, content, told in entries:
        method, flags = told.get("method", 0), told.get("flags", 0)
        size, crc = told.get("size", len(content)), told.get("crc", zlib.crc32(content))
        stored = told.get("stored", len(content))
        fixed = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, crc, stored, size, len(name), 0)
        central += b"PK\x01\x02" + struct.pack("<H", 0x031E) + fixed
        central += struct.pack("<HHHII", 0, 0, 0, told.get("mode", 0o100644) << 16, len(body)) + name
        body += b"PK\x03\x04" + fixed + name + content
    end = struct.pack("<HHHHIIH", 0, 0, len(entries) % 65536, len(entries) % 65536, len(central), len(body), 0)
    return bytes(body + central) + b"PK\x05\x06" + end


def bomb(name: str, megabytes: int, told: int | None = None) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()
    size = megabytes * 2**20 if told is None else told
    return raw_zip([(name.encode(), content, {"method": 8, "size": size, "crc": 0})])


HOSTILE_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "empty file": lambda: b"",
    "garbage": lambda: bytes(range(256)) * 40,
    "no entries": lambda: raw_zip([]),
    "end of an archive alone": lambda: b"PK\x05\x06" + b"\xff" * 18,
    "a declared bomb": lambda: bomb("plan.json", 600),
    "an undeclared bomb": lambda: bomb("plan.json", 600, told=100),
    "a plan that is a bomb within what is allowed": lambda: bomb("plan.json", 500),
    "a path that climbs": lambda: raw_zip([(b"../../escaped", b"x", {})]),
    "an absolute path": lambda: raw_zip([(b"/tmp/escaped", b"x", {})]),
    "a path with back slashes": lambda: raw_zip([(b"..\\escaped", b"x", {})]),
    "a path of a drive": lambda: raw_zip([(b"C:escaped", b"x", {})]),
    "a climbing path that ends well": lambda: raw_zip([(b"../plan.json", b"x", {})]),
    "a folder": lambda: raw_zip([(b"controls/", b"", {"mode": 0o040755})]),
    "a link": lambda: raw_zip([(b"plan.json", b"/etc/passwd", {"mode": 0o120777})]),
    "an encrypted file": lambda: raw_zip([(b"plan.json", b"x" * 20, {"flags": 1})]),
    "an unknown packing": lambda: raw_zip([(b"plan.json", b"x" * 20, {"method": 99})]),
    "a wrong checksum": lambda: raw_zip([(b"plan.json", b"x" * 20, {"crc": 1})]),
    "longer than it says": lambda: raw_zip([(b"plan.json", b"x" * 20, {"size": 5})]),
    "very many files": lambda: raw_zip([(b"", b"", {})] * 100_000),
    "an archive within": lambda: raw_zip([(b"evidence.zip", raw_zip([(b"plan.json", b"{}", {})]), {})]),
    "a name that steers": lambda: raw_zip([(STEERING.encode(), b"x", {"flags": 0x800})]),
}


@pytest.mark.parametrize("what", HOSTILE_ARCHIVES)
def test_a_hostile_archive_is_one_line_and_touches_nothing(
    what: str, verify: Callable[..., Ended], tmp_path: Path
) -> None:
    archive = tmp_path / "in" / "here" / "evidence.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(HOSTILE_ARCHIVES[what]())
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    ended = verify(archive)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ended.code == CHANGED
    assert ended.err.rstrip("\n").isprintable()
    assert peak < 64 * 2**20 + 4 * archive.stat().st_size
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped").exists()


HOSTILE_TEXTS: dict[str, bytes] = {
    "empty": b"", "null": b"null", "a list": b"[]", "an object": b"{}", "not a number": b"NaN", "no text": b"\xff\xfe\x00", "nul": b"\0" * 50,
    "nested lists": b"[" * 200_000, "nested objects": b'{"a":' * 200_000, "well nested": b'{"schema":' + b"[" * 900 + b"]" * 900 + b"}",
    "a huge number": b"9" * 5000, "a huge exponent": b'{"schema": 1e999}', "half a pair": b'"\\ud800"', "a line feed": b"\n", "lines": b"\n\n{}\n",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["plan.json", "exchanges.jsonl", "observations.jsonl", "findings.json", "verdict.json", STATEMENT]
)
def test_hostile_contents_end_as_bad_input(
    name: str, signed: Path, verify: Callable[..., Ended], stranger: Path, tmp_path: Path
) -> None:
    files = unpacked(report_of(signed) / "evidence.zip")
    alone = tmp_path / "alone.zip"
    for what, data in HOSTILE_TEXTS.items():
        if name == STATEMENT:
            changed = packed(files | {name: data})
        else:
            held = files | {name: data}
            if name == "observations.jsonl":
                verdict = json.loads(files["verdict.json"]) | {"observations_sha256": sha256_hex(data)}
                held["verdict.json"] = canonical_bytes(verdict)
            changed = resealed(held, stranger)
        alone.write_bytes(changed)
        assert verify(alone).code in (OTHERWISE, CHANGED), what
        assert verify(alone, "--json").code in (OTHERWISE, CHANGED), what


HOSTILE_VALUES: list[object] = [
    None, True, -1, 0, 2**53, 10**300, 1e308, -1e308, "", "x", STEERING, "0" * 64, [], {}, [[]], {"a": []}, "2026-01-01", "/etc/passwd", ["x"],
]  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else range(min(2, len(value)))
        return [path, *(leaf for key in keys for leaf in leaves(value[key], (*path, key)))]
    return [path]


def with_value(document: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = with_value(copy[path[0]], path[1:], value)
    return copy


def hostile_variants(files: dict[str, bytes], every: int) -> list[tuple[str, dict[str, bytes]]]:
    """Evidence with one value changed, of plan, verdict, findings and the first answer."""
    made = []
    for name in ("plan.json", "verdict.json", "findings.json", "exchanges.jsonl"):
        lines = files[name].splitlines() if name.endswith("l") else [files[name]]
        numbers = (0, 1, len(lines) - 1) if name.endswith("l") else (0,)
        for number in numbers:
            document = json.loads(lines[number])
            for path in leaves(document):
                for value in HOSTILE_VALUES:
                    text = json.dumps(with_value(document, path, value)).encode()
                    whole = [*lines[:number], text, *lines[number + 1 :]]
                    data = b"\n".join(whole) + b"\n" if name.endswith("l") else text
                    made.append((f"{name} {number} {path} {value!r}", files | {name: data}))
    return made[::every]


def test_a_hostile_value_in_any_place_is_no_fault_of_ours(
    signed: Path, verify: Callable[..., Ended], stranger: Path, tmp_path: Path
) -> None:
    files = unpacked(report_of(signed) / "evidence.zip")
    alone = tmp_path / "alone.zip"
    for what, held in hostile_variants(files, every=53):
        alone.write_bytes(resealed(held, None))
        ended = verify(alone)
        assert ended.code in (OTHERWISE, CHANGED, UNKNOWN), what
        assert ended.said.isprintable(), what


def test_a_request_that_no_collector_sends_is_bad_input(
    signed: Path, verify: Callable[..., Ended], tmp_path: Path
) -> None:
    files = unpacked(report_of(signed) / "evidence.zip")
    lines = [json.loads(line) for line in files["exchanges.jsonl"].splitlines()]
    for line in lines:
        if line["event"] == "sent" and "max_tokens" in line["body"]:
            line["body"]["max_tokens"] = ["x"]
    held = files | {"exchanges.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in lines)}
    alone = tmp_path / "alone.zip"
    alone.write_bytes(resealed(held, None))
    ended = verify(alone)
    assert (ended.code, "cannot be judged (TypeError)" in ended.err) == (CHANGED, True)


def test_a_statement_that_says_anything_is_shown_as_json(
    signed: Path, verify: Callable[..., Ended], stranger: Path, tmp_path: Path
) -> None:
    files = unpacked(report_of(signed) / "evidence.zip")
    deep: Any = []
    for _ in range(700):
        deep = [deep]
    alone = tmp_path / "alone.zip"
    for hostile in (deep, "x" * 100, {"a": STEERING}, [{"file": 1}], 7):
        alone.write_bytes(resealed(files, stranger, redactions=hostile))
        ended = verify(alone, "--json")
        assert ended.code == UNKNOWN, ended.said
        assert ended.out.replace("\n", "").isprintable()
        json.loads(ended.out, parse_constant=pytest.fail)


@pytest.mark.parametrize("where", ["reference_path", "reference.id"])
def test_a_strangers_plan_opens_no_file_of_this_machine(
    where: str,
    signed: Path,
    verify: Callable[..., Ended],
    stranger: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = other_bundle(tmp_path)
    files = unpacked(report_of(signed, FAR) / "evidence.zip")
    plan = json.loads(files["plan.json"])
    if where == "reference_path":
        plan["reference_path"] = str(secret)
    else:
        plan["reference"]["id"] = str(secret)
    plan["endpoint"]["reference"] = str(secret)
    alone = tmp_path / "alone.zip"
    alone.write_bytes(resealed(files | {"plan.json": json.dumps(plan).encode()}, stranger))
    opened: list[str] = []
    honest = Path.open

    def watched(self: Path, *rest: Any, **more: Any) -> Any:
        opened.append(str(self))
        return honest(self, *rest, **more)

    monkeypatch.setattr(Path, "open", watched)
    ended = verify(alone)
    assert ended.code in (OTHERWISE, UNKNOWN, CHANGED)
    assert any(path.endswith("alone.zip") for path in opened)
    assert not any(path.startswith(str(secret)) for path in opened)


# -- publishing ------------------------------------------------------------------------------------------------


def test_a_second_publish_enters_nothing_and_writes_no_file(publish: Publish, site: Path, key: Path) -> None:
    first = said_json(publish("--key", key, "--json"))
    assert sorted(report["endpoint"] for report in first["reports"]) == ["Far host", "Plain host", "Routed host"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in site.rglob("*") if path.is_file()}
    second = said_json(publish("--key", key, "--json"))
    assert (second["reports"], second["held"], second["left_out"], second["files_written"]) == ([], [], [], 0)
    assert second["head"] == first["head"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in site.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("is_signed", [True, False])
def test_two_sites_of_the_same_runs_are_the_same_bytes(
    is_signed: bool, publish: Publish, tmp_path: Path, key: Path
) -> None:
    options = ("--key", key) if is_signed else ()
    for name in ("one", "two"):
        assert publish(*options, out=tmp_path / name).code == WHOLE
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_run_that_was_judged_again_supersedes_and_the_old_one_stays(
    publish: Publish, root: Path, site: Path, key: Path, verify: Callable[..., Ended]
) -> None:
    assert publish("--key", key).code == WHOLE
    old = report_of(site)
    before = unpacked(old / "evidence.zip")
    # Another version's words: the form is tested, not the judgement. `replay` makes no row, so that the old one stands beside it.
    edit(root / NIGHT / PLAIN / "verdict.json", weighbridge_version="0.0.9", answers_used=5)
    of_no_night(root / NIGHT / PLAIN)
    os.utime(root / NIGHT / PLAIN / "row.json", (0, 0))
    assert publish("--key", key).code == WHOLE
    first, second = (line for line in reports_in(site) if line["slug"] == PLAIN)
    assert (second["supersedes"], second["weighbridge_version"], second["answers_used"]) == (first["index"], "0.0.9", 5)
    assert unpacked(old / "evidence.zip") == before
    for endpoint in ("index.html", "index.md"):
        page = (site / "endpoints" / PLAIN / endpoint).read_text("utf-8")
        assert old.name in page
    ended = verify(old)
    assert (ended.code, f"superseded by line {second['index'] + 1}" in ended.said) == (WHOLE, True)
    assert verify(site).code == WHOLE
    assert said_json(publish("--key", key, "--json"))["files_written"] == 0
    assert len(reports_in(site)) == 4


def test_what_differs_is_held_until_its_notice_is_over_and_nothing_of_it_is_shown(
    publish: Publish, root: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_instead(root / NIGHT / PLAIN, "differs", "precision")
    word = b"differs"
    for other in (ROUTED, FAR):
        say_instead(root / NIGHT / other, "consistent")
    # Pages that say what words mean say that one too.
    ended = publish("--notice-days", 14)
    assert ended.code == WHOLE
    assert "held back: Plain host, until 2026-12-07: tell the host now" in ended.out
    shown = everything_in(site)
    for hidden in (
        b"Plain host",
        PLAIN.encode(),
        json.loads((root / NIGHT / PLAIN / "plan.json").read_bytes())["run_id"].encode(),
    ):
        assert hidden not in shown
    assert not [line for line in lines_of(site) if word in canonical_bytes(line) and line["kind"] != "method"]
    (held,) = [line for line in lines_of(site) if line["kind"] == "held"]
    assert held["until"] == "2026-12-07"
    it_is(monkeypatch, NOON + timedelta(days=13))
    assert said_json(publish("--notice-days", 14, "--json"))["reports"] == []
    assert len(reports_in(site)) == 2
    it_is(monkeypatch, NOON + timedelta(days=14))
    assert [r["endpoint"] for r in said_json(publish("--notice-days", 14, "--json"))["reports"]] == ["Plain host"]
    assert sha256_hex((report_of(site) / "evidence.zip").read_bytes()) == held["evidence_sha256"]


def test_what_differs_by_itself_has_its_notice_where_a_fleets_night_does_not_let_it_be_named(
    publish: Publish, root: Path, site: Path
) -> None:
    """Its evidence says so all the same."""
    run = root / NIGHT / PLAIN
    for name in ("verdict.json", "row.json"):
        edit(run / name, verdict="differs", cause="precision")
    night = json.loads((run.parent / "fleet.json").read_bytes())
    assert {row["endpoint"]: row["verdict"] for row in night["endpoints"]}["Plain host"] == "inconclusive"
    assert "Plain host" in {held["endpoint"] for held in said_json(publish("--notice-days", 14, "--json"))["held"]}
    assert b"Plain host" not in everything_in(site)


def sealed_runs(kept: Path, cli: Weighbridge) -> Path:
    """A judged run whose bundle lies in a folder of this machine and whose pool is sealed."""
    if not (kept / "sealed").exists():
        bundle = other_bundle(kept, "sealed")
        with FaultServer(answers) as server:
            endpoint = table("Sealed host", server.base_url, reference=str(bundle), limits={"max_requests": 14})
            fleet = write_fleet(kept, endpoint)
            assert cli("nightly", fleet, "--out", kept / "sealed").code in (WHOLE, OTHERWISE, UNKNOWN)
    return kept / "sealed"


def test_a_sealed_pool_is_held_until_it_is_disclosed_and_its_host_has_its_notice(
    kept: Path,
    weighbridge_cli: Weighbridge,
    site: Path,
    tmp_path: Path,
    verify: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(sealed_runs(kept, weighbridge_cli), root)
    run = root / NIGHT / "sealed-host"
    plan = json.loads((run / "plan.json").read_bytes())
    say_instead(run, "differs", "precision")

    def publish(*options: object) -> dict[str, Any]:
        ended = weighbridge_cli("publish", "--runs", root, "--out", site, "--json", *options)
        assert ended.code == WHOLE, ended.said
        return said_json(ended)

    held = {"endpoint": "Sealed host", "evidence": str(run / "evidence.zip")}
    assert publish()["held"] == [held | {"until": None}]
    assert publish()["held"] == [held | {"until": None}]
    shown = everything_in(site)
    assert plan["probe_requests"], "else there is nothing to be hidden"
    for text in [r["probe"]["messages"][-1]["content"] for r in plan["probe_requests"]]:
        assert json.dumps(text, ensure_ascii=False)[1:-1].encode() not in shown
    assert b"Sealed host" not in shown
    assert len([line for line in lines_of(site) if line["kind"] == "held"]) == 1
    assert publish("--disclose", plan["pool"]["sha256"])["held"] == [held | {"until": "2026-12-07"}]
    it_is(monkeypatch, NOON + timedelta(days=10))
    assert publish()["held"] == [held | {"until": "2026-12-07"}], "the notice runs once"
    it_is(monkeypatch, NOON + timedelta(days=14))
    assert [r["endpoint"] for r in publish()["reports"]] == ["Sealed host"]
    shown = everything_in(site)
    assert str(kept).encode() not in shown, "where the reference lies is nobody's concern"
    assert str(tmp_path).encode() not in shown
    bundle = plan["reference_path"]
    ended = verify(report_of(site, "sealed-host"), "--reference", bundle)
    assert (ended.code, "verdict.json came out otherwise" in ended.said) == (OTHERWISE, True)
    assert "findings.json" not in ended.said, "what was taken out changes no finding"
    ended = verify(report_of(site, "sealed-host"))
    assert (ended.code, "the reference is not at hand" in ended.said) == (UNKNOWN, True)


@pytest.mark.parametrize(
    ("level", "visibility", "held"), [("L3", "sealed", True), ("prompt", "sealed", True), ("prompt", "public", False)]
)
def test_a_run_is_held_for_any_pool_that_is_sealed(
    level: str, visibility: str, held: bool, root: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(str(other_bundle(tmp_path / "keeper", visibility, level)))
    plan = RunFolder(root / NIGHT / PLAIN).plan()
    state = _State.of(Appending(read_log(tmp_path / "none")))
    assert _is_sealed(plan, bundle, state) is held


def test_nothing_of_the_auditors_own_is_in_any_file_and_the_judgement_is_the_same(
    root: Path, publish: Publish, site: Path, key: Path, verify: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = b"".join(tree(root / NIGHT).values())
    for known in ("SHOP_API_KEY", ACCOUNT, FINE_TUNE):
        assert known.encode() in raw, "else there is nothing to be taken out"
    monkeypatch.setenv("SHOP_API_KEY", KEY)
    assert publish("--key", key).code == WHOLE
    shown = everything_in(site)
    owner = (root / NIGHT / PLAIN / "owner").read_bytes()
    private = b"".join(key.read_bytes().splitlines()[1:-1])
    for own in (
        b"SHOP_API_KEY",
        ACCOUNT.encode(),
        FINE_TUNE.encode(),
        KEY.encode(),
        owner,
        private,
        str(root.parent).encode(),
    ):
        assert own not in shown
    for slug in (PLAIN, ROUTED):
        found = said_json(verify(report_of(site, slug), "--json"))
        assert found["judged_again"] == "same"
        assert {r["file"] for r in found["redactions"]} >= {"exchanges.jsonl"}


ODD_LISTINGS: dict[str, object] = {
    "no list": {"data": {"object": "model", "owner": ACCOUNT}},
    "null": {"data": None, "account": ACCOUNT},
    "an error": {"error": {"message": "no such route"}, "user_id": ACCOUNT},
    "nothing of it": {"account": ACCOUNT},
    "a list alone": [ACCOUNT],
    "a deep one": {"data": [{"id": MODEL, "owner": [[[[ACCOUNT]]]]}]},
}


@pytest.mark.parametrize("what", ODD_LISTINGS)
def test_an_odd_listing_says_nothing_of_the_account_either(
    what: str,
    root: Path,
    publish: Publish,
    site: Path,
    verify: Callable[..., Ended],
    weighbridge_cli: Weighbridge,
    tmp_path: Path,
) -> None:
    """The listing's answer is put into the recorded exchanges, and judged anew."""
    run = root / NIGHT / PLAIN
    lines = [json.loads(line) for line in (run / "exchanges.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        if line["event"] == "received" and line["request_id"] == "route-listing":
            line["body_text"] = json.dumps(ODD_LISTINGS[what])
    (run / "exchanges.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert weighbridge_cli("replay", run).code == UNKNOWN
    assert publish().code == WHOLE
    assert ACCOUNT.encode() not in everything_in(site)
    assert said_json(verify(report_of(site), "--json"))["judged_again"] == "same"


def test_a_signed_site_stays_signed_by_the_same_key(publish: Publish, signed: Path, stranger: Path, key: Path) -> None:
    before = tree(signed)
    for options in ((), ("--key", stranger)):
        ended = publish(*options)
        assert (ended.code, "is signed by the key in" in ended.err) == (CHANGED, True)
        assert tree(signed) == before
    assert publish("--key", key).code == WHOLE


def test_an_unsigned_site_says_so(publish: Publish, site: Path, verify: Callable[..., Ended]) -> None:
    assert publish().code == WHOLE
    assert json.loads((site / "index.json").read_bytes())["signer"] is None
    assert "not signed" in (site / "index.html").read_text("utf-8")
    for path in (site, report_of(site)):
        ended = verify(path)
        assert (ended.code, "unsigned" in ended.out) == (UNKNOWN, True)


class Killed(BaseException):
    """As SIGKILL: nothing that handles errors handles it."""


def killed(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("how", ["full disk", "killed"])
def test_a_crash_at_any_file_is_mended_by_the_next_publish(
    at: int,
    how: str,
    publish: Publish,
    site: Path,
    key: Path,
    verify: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert publish("--key", key, out=tmp_path / "undisturbed").code == WHOLE
    written = 0

    def failing(path: Path, data: bytes) -> None:
        nonlocal written
        if path.is_relative_to(site):
            written += 1
            if written == at and how == "killed":
                raise Killed
            if written >= at:
                no_space()
        write_atomically(path, data)

    with monkeypatch.context() as patch:
        for module in ("enter", "log"):
            patch.setattr(f"weighbridge.publish.{module}.write_atomically", failing)
        patch.setattr("weighbridge.publish.enter._write", failing)
        if how == "killed":
            patch.setattr("weighbridge.publish.log.Appending.write", killed)
            with pytest.raises(Killed):
                publish("--key", key)
        else:
            ended = publish("--key", key)
            assert ended.code in (WHOLE, CHANGED)
            assert "left out" in ended.said or "No space left" in ended.err
    for line in reports_in(site) if (site / LOG).exists() else []:
        folder = site / "reports" / line["slug"] / f"{line['night']}-{line['evidence_sha256'][:12]}"
        assert (folder / "evidence.zip").exists(), "evidence is there before its entry is"
    assert publish("--key", key).code == WHOLE
    assert sorted(line["slug"] for line in reports_in(site)) == [FAR, PLAIN, ROUTED]
    assert verify(site).code == WHOLE
    assert sorted(tree(site)) == sorted(tree(tmp_path / "undisturbed"))


def test_a_log_whose_last_line_was_cut_goes_on(
    publish: Publish, root: Path, site: Path, key: Path, verify: Callable[..., Ended]
) -> None:
    assert publish("--key", key).code == WHOLE
    whole = (site / LOG).read_bytes()
    for cut in (whole[:-30], whole + whole[:30]):
        (site / LOG).write_bytes(cut)
        assert publish("--key", key).code == WHOLE
        assert verify(site).code == WHOLE
        assert sorted(line["slug"] for line in reports_in(site)) == [FAR, PLAIN, ROUTED]


def test_an_edited_log_is_never_added_to(publish: Publish, signed: Path, key: Path) -> None:
    lines = (signed / LOG).read_bytes().splitlines(keepends=True)
    (signed / LOG).write_bytes(b"".join([lines[0].replace(NIGHT.encode(), b"2026-11-21"), *lines[1:]]))
    before = tree(signed)
    ended = publish("--key", key)
    assert (ended.code, "the chain is broken at line 2" in ended.err) == (CHANGED, True)
    assert tree(signed) == before


def test_two_at_once_are_one_after_the_other(publish: Publish, site: Path, weighbridge_cli: Weighbridge) -> None:
    with filelock.FileLock(site.parent / f".{site.name}.publish.lock"):
        ended = publish()
        assert (ended.code, "another command is at work" in ended.err) == (CHANGED, True)
        assert len(ended.err.splitlines()) == 1
    assert publish().code == WHOLE


def gone(path: Path) -> Path:
    path.unlink()
    return path


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "no plan that can be read": lambda run: (run / "plan.json").write_text("{"),
    "no findings that can be read": lambda run: (run / "findings.json").write_text("{}"),
    "no verdict that can be read": lambda run: (run / "verdict.json").write_text("[" * 90_000),
    "no page": lambda run: (run / "report.html").unlink(),
    "a page that is a link": lambda run: gone(run / "report.html").symlink_to("/etc/passwd"),
    "a folder for a file": lambda run: gone(run / "findings.json").mkdir(),
    "an answer cut short": lambda run: (run / "exchanges.jsonl").write_bytes((run / "exchanges.jsonl").read_bytes() + b'{"event": "received", "request_id": "route-li'),
    "a line that is none": lambda run: (run / "exchanges.jsonl").write_text('{"request_id": "route-listing"\n'),
    "a commitment that is none": lambda run: edit(run / "plan.json", draw={"seed": "x", "commitment": "none"}),
    "a list for a line": lambda run: (run / "exchanges.jsonl").write_text('["route-listing"]\n'),
    "a time without a zone": lambda run: (run / "exchanges.jsonl").write_text((run / "exchanges.jsonl").read_text("utf-8").replace("+00:00", ""), "utf-8"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_run_that_cannot_be_read_is_named_and_the_others_go_on(
    what: str, publish: Publish, root: Path, site: Path
) -> None:
    UNREADABLE[what](root / NIGHT / PLAIN)
    (root / NIGHT / PLAIN / "row.json").unlink()
    for index in root.glob("history.sqlite*"):
        index.unlink()
    for _ in range(2):
        ended = publish()
        assert ended.code == WHOLE, ended.said
        assert {FAR, ROUTED} <= {line["slug"] for line in reports_in(site)}
        is_in = (site / "endpoints" / PLAIN).exists()
        assert is_in or "left out" in ended.said
        assert is_in or str(root / NIGHT / PLAIN) in ended.said or "Plain host" in ended.said


@pytest.mark.parametrize("text", ["{", "[]", '{"committed": [{"commitment": "x"}]}'])
def test_a_night_that_cannot_be_read_is_one_line(text: str, publish: Publish, root: Path) -> None:
    (root / NIGHT / "night.json").write_text(text)
    ended = publish()
    assert ended.code == CHANGED
    assert len(ended.err.splitlines()) == 1
    night = json.dumps({
        "schema": "weighbridge/night/1", "night": "no date", "fleet": "f", "weighbridge_version": "0.1.0", "began_at": NOON.isoformat(),
        "committed": [{"endpoint": "e", "folder": "e", "run_id": "r", "commitment": "no digest"}],
    })  # fmt: skip
    (root / NIGHT / "night.json").write_text(night)
    assert publish().code == CHANGED


def test_no_runs_at_all_make_a_site_that_says_so(
    weighbridge_cli: Weighbridge, tmp_path: Path, site: Path, verify: Callable[..., Ended]
) -> None:
    ended = weighbridge_cli("publish", "--runs", tmp_path / "nothing", "--out", site)
    assert (ended.code, "there is no folder" in ended.err) == (CHANGED, True)
    assert not site.exists()
    (tmp_path / "nothing").mkdir()
    ended = weighbridge_cli("publish", "--runs", tmp_path / "nothing", "--out", site)
    assert ended.code == WHOLE, ended.said
    assert "No report has been published yet" in (site / "index.html").read_text("utf-8")


def test_two_names_with_one_page_are_refused_and_what_was_there_stays_whole(
    publish: Publish, root: Path, site: Path, key: Path, verify: Callable[..., Ended]
) -> None:
    assert publish("--key", key).code == WHOLE
    twin = root / "2026-11-23" / "twin"
    shutil.copytree(root / NIGHT / PLAIN, twin)
    rename(twin, "plain HOST")
    edit(twin / "plan.json", run_id="0123456789abcdef")
    night = json.loads((root / NIGHT / "night.json").read_bytes())
    night["committed"][0]["commitment"] = "5" * 64
    (root / "2026-11-23" / "night.json").write_text(json.dumps(night | {"night": "2026-11-23"}))
    ended = publish("--key", key)
    assert (ended.code, "'Plain host' and 'plain HOST' would share a page" in ended.err) == (CHANGED, True)
    assert verify(site).code == WHOLE, "what a reader finds meanwhile is whole"


def rename(run: Path, name: str) -> None:
    """Another name in a judged run: the form is tested, not the judgement."""
    plan = json.loads((run / "plan.json").read_bytes())
    plan["endpoint"]["name"] = name
    (run / "plan.json").write_text(json.dumps(plan), "utf-8")
    (run / "row.json").unlink()
    of_no_night(run)
    for index in run.parent.parent.glob("history.sqlite*"):
        index.unlink()


@pytest.mark.parametrize(
    "name",
    ["../../../escaped", "/etc/passwd", "..", "...---...", "\U0001f600" * 120, "x" * 120, "a\u202eb\x1b]0;t\x07", "C:\\x", "con", "ünïcode", "<script>alert(1)</script>"],
)  # fmt: skip
def test_a_hostile_name_stays_inside_the_site(
    name: str, publish: Publish, root: Path, site: Path, tmp_path: Path, verify: Callable[..., Ended]
) -> None:
    rename(root / NIGHT / PLAIN, name)
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(site)}
    ended = publish()
    assert ended.code == WHOLE, ended.said
    assert ended.out.replace("\n", "").isprintable()
    made = {path for path in tmp_path.rglob("*") if not path.is_relative_to(site)} - outside
    assert {path.name.split(".")[-1] for path in made} <= {"lock", "zip", "sqlite", "sqlite-wal", "sqlite-shm"}
    (entry,) = [line for line in reports_in(site) if line["endpoint"] == name]
    assert (site / "reports" / entry["slug"]).is_dir()
    ended = verify(report_of(site, entry["slug"]))
    assert ended.code == UNKNOWN
    assert ended.out.replace("\n", "").isprintable()
    assert "<script>" not in (site / "endpoints" / entry["slug"] / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "named"),
    [("title = ", "is not TOML"), ("colour = 1", "unknown field colour"), ('base_url = "http://a.example"', "field base_url"),
     ('base_url = "https://me:secret@a.example"', "field base_url"), ("title = 7", "field title"), ('title = ""', "field title"),
     ('contact = ["x"]', "field contact"), ("\x00", "is not TOML")],
)  # fmt: skip
def test_a_bad_site_file_is_one_line_that_names_file_and_field(
    text: str, named: str, publish: Publish, site: Path
) -> None:
    site.mkdir()
    (site / "site.toml").write_text(text)
    ended = publish()
    assert (ended.code, named in ended.err, str(site / "site.toml") in ended.err) == (CHANGED, True, True)
    assert len(ended.err.splitlines()) == 1
    assert sorted(tree(site)) == ["site.toml"]


def test_no_space_left_is_one_line(
    publish: Publish, site: Path, monkeypatch: pytest.MonkeyPatch, verify: Callable[..., Ended]
) -> None:
    for where in ("weighbridge.publish.build._write", "weighbridge.publish.log.Appending.write", "pathlib.Path.mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(where, lambda *_, **__: no_space())
            ended = publish()
            assert (ended.code, "No space left on device" in ended.err) == (CHANGED, True), where
            assert "Traceback" not in ended.err
    assert publish().code == WHOLE
    assert verify(site).code == UNKNOWN


def test_a_site_that_is_a_file_is_one_line(publish: Publish, site: Path) -> None:
    site.write_text("x")
    ended = publish()
    assert (ended.code, f"{site} cannot be written" in ended.err) == (CHANGED, True)


# -- disputes --------------------------------------------------------------------------------------------------

Dispute = Callable[..., Ended]
TEXT = "We set this prompt <b>by mistake</b> & mended it.\n[click](javascript:alert(1)) \x1b]0;title\x07 ünïcode"


@pytest.fixture
def dispute(weighbridge_cli: Weighbridge, signed: Path, key: Path, tmp_path: Path) -> Dispute:
    def enter_one(
        report: str, what: str, *options: object, text: str | bytes | None = None, by: str = "A Host"
    ) -> Ended:
        if text is not None:
            file = tmp_path / "statement.txt"
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
            options = (*options, "--text", file)
        return weighbridge_cli("dispute", signed, report, what, "--by", by, "--key", key, *options)

    return enter_one


def test_a_dispute_goes_its_course_and_stands_on_every_page(
    dispute: Dispute,
    publish: Publish,
    signed: Path,
    root: Path,
    key: Path,
    verify: Callable[..., Ended],
    weighbridge_cli: Weighbridge,
) -> None:
    def standing() -> object:
        return next(e for e in json.loads((signed / "index.json").read_bytes())["endpoints"] if e["slug"] == PLAIN)[
            "dispute"
        ]

    first = report_of(signed)
    assert dispute(PLAIN, "dispute_opened", text=TEXT, by="A <i>Host</i>").code == WHOLE
    assert standing() == "open"
    assert dispute(PLAIN, "reply", "--link", "https://host.example/statement").code == WHOLE
    assert standing() == "answered"
    again = root / "2026-11-23" / PLAIN
    shutil.copytree(root / NIGHT / PLAIN, again)
    (again / "row.json").unlink()
    edit(again / "plan.json", run_id="0123456789abcdef", created_at="2026-11-23T22:00:00+00:00")
    assert publish("--key", key).code == WHOLE
    digest = sha256_hex((first / "evidence.zip").read_bytes())
    assert dispute(digest[:12], "re_run", "--answered-by", PLAIN, text="It was run again.").code == WHOLE
    assert standing() == "re-run"
    assert dispute(digest[:12], "resolved", text="Both agree.").code == WHOLE
    assert dispute(digest[:12], "correction", text="The night was another one.", by="An Auditor").code == WHOLE
    assert standing() == "resolved"
    ended = dispute(PLAIN, "re_run", "--answered-by", digest[:12], text="An earlier one is no answer.")
    assert ended.code == CHANGED

    page = signed / "endpoints" / PLAIN
    html, markdown, data = ((page / f"index.{kind}").read_text("utf-8") for kind in ("html", "md", "json"))
    feed = (signed / "feed.atom").read_text("utf-8")
    assert escape("We set this prompt <b>by mistake</b> & mended it.", quote=False) in html
    for text in (html, markdown, feed):
        assert "by mistake" in text
        assert "<b>by mistake" not in text
        assert "<i>Host" not in text
        assert not {"\x1b", "\x07"} & set(text)
        assert "https://host.example/statement" in text
        assert "ünïcode" in text
    assert "[click](javascript" not in markdown
    statements = json.loads(data)["statements"]
    assert [s["what"] for s in statements] == ["dispute_opened", "reply", "re_run", "resolved", "correction"]
    assert statements[0]["text"] == TEXT
    assert verify(signed).code == WHOLE
    ended = verify(first)
    assert ended.code == WHOLE
    assert "dispute opened by A <i>Host</i>: We set this prompt" in ended.said
    assert ended.out.replace("\n", "").isprintable()
    assert [s["what"] for s in said_json(verify(first, "--json"))["statements"]] == [s["what"] for s in statements]
    assert said_json(publish("--key", key, "--json"))["files_written"] == 0


BAD_STATEMENTS: dict[str, tuple[tuple[object, ...], dict[str, Any], str]] = {
    "plain http": (("--link", "http://host.example/"), {}, "statement's link"),
    "a script": (("--link", "javascript:alert(1)"), {}, "statement's link"),
    "credentials": (("--link", "https://me:secret@host.example/"), {}, "statement's link"),
    "controls": (("--link", "https://host.example/\x1b[2J"), {}, "statement's link"),
    "a bracket": (("--link", "https://[host/"), {}, "statement's link"),
    "a long link": (("--link", "https://host.example/" + "x" * 1000), {}, "statement's link"),
    "too long": ((), {"text": "x" * 10_001}, "statement's text"),
    "nothing": ((), {"text": ""}, "holds no statement"),
    "white space": ((), {"text": " \n\t"}, "holds no statement"),
    "binary": ((), {"text": b"\x89PNG\r\n\x1a\n\xff\x00"}, "cannot be read as text"),
    "nobody": ((), {"text": "x", "by": ""}, "statement's by"),
    "somebody long": ((), {"text": "x", "by": "y" * 121}, "statement's by"),
    "neither": ((), {}, "either --text or --link"),
    "both": (("--link", "https://host.example/"), {"text": "x"}, "either --text or --link"),
    "an answer that is none": (("--answered-by", PLAIN), {"text": "x"}, "belong together"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_STATEMENTS)
def test_a_bad_statement_is_one_line_and_enters_nothing(bad: str, dispute: Dispute, signed: Path) -> None:
    options, more, named = BAD_STATEMENTS[bad]
    before = tree(signed)
    ended = dispute(PLAIN, "reply", *options, **more)
    assert (ended.code, named in ended.err) == (CHANGED, True), ended.said
    assert len(ended.err.splitlines()) == 1
    assert ended.err.rstrip("\n").isprintable()
    assert tree(signed) == before


def test_a_report_that_nobody_knows_and_one_of_another_endpoint_are_refused(dispute: Dispute, signed: Path) -> None:
    before = tree(signed)
    for unknown in ("nobody", "0123456789ab", "", STEERING, "../x"):
        ended = dispute(unknown, "reply", text="x")
        assert (ended.code, "no report is" in ended.err) == (CHANGED, True)
        assert ended.err.rstrip("\n").isprintable()
    ended = dispute(PLAIN, "re_run", "--answered-by", FAR, text="x")
    assert (ended.code, "is no later report of" in ended.err) == (CHANGED, True)
    ended = dispute(PLAIN, "re_run", "--answered-by", PLAIN, text="x")
    assert ended.code == CHANGED
    ended = dispute(PLAIN, "shouting", text="x")
    assert ended.code == CHANGED
    assert tree(signed) == before


def test_a_statement_about_a_superseded_report_stands_on_its_endpoints_page(
    dispute: Dispute, publish: Publish, root: Path, signed: Path, key: Path, verify: Callable[..., Ended]
) -> None:
    old = report_of(signed)
    edit(root / NIGHT / PLAIN / "verdict.json", weighbridge_version="0.0.9")
    (root / NIGHT / PLAIN / "row.json").unlink()
    assert publish("--key", key).code == WHOLE
    digest = sha256_hex((old / "evidence.zip").read_bytes())
    assert dispute(digest[:8], "correction", text="That one was wrong.", by="An Auditor").code == WHOLE
    assert "That one was wrong." in (signed / "endpoints" / PLAIN / "index.html").read_text("utf-8")
    ended = verify(old)
    assert (ended.code, "That one was wrong." in ended.out, "superseded by" in ended.out) == (WHOLE, True, True)


def test_a_statement_needs_the_sites_key(weighbridge_cli: Weighbridge, signed: Path, tmp_path: Path) -> None:
    ended = weighbridge_cli("dispute", signed, PLAIN, "reply", "--by", "x", "--link", "https://a.example/")
    assert (ended.code, "is signed by the key in" in ended.err) == (CHANGED, True)
    ended = weighbridge_cli(
        "dispute", tmp_path / "nowhere", PLAIN, "reply", "--by", "x", "--link", "https://a.example/"
    )
    assert (ended.code, "holds no log.jsonl" in ended.err) == (CHANGED, True)


# -- commitments -----------------------------------------------------------------------------------------------


def test_the_draws_are_in_the_log_before_the_first_request_and_name_nobody(
    weighbridge_cli: Weighbridge, site: Path, key: Path, tmp_path: Path, verify: Callable[..., Ended]
) -> None:
    seen: list[bytes] = []

    def watching(call: Call) -> None:
        seen.append((site / LOG).read_bytes() if (site / LOG).exists() else b"")
        call.send_json(200, completion(None))

    with FaultServer(watching) as server:
        fleet = write_fleet(tmp_path, table("First host", server.base_url), table("Second host", server.base_url))
        options = ("--site", site, "--key", key)
        ended = weighbridge_cli("nightly", fleet, "--out", tmp_path / "nights", *options)
        assert ended.code == UNKNOWN, ended.said
        assert seen
        assert verify(site).code == WHOLE, "the head was signed with it"
        weighbridge_cli("nightly", fleet, "--out", tmp_path / "nights", *options)
    assert len(set(seen)) == 1, "the log was as it is before the first request, and nothing was added during the night"
    (line,) = [json.loads(line) for line in seen[0].splitlines()]
    plans = [json.loads(p.read_bytes()) for p in (tmp_path / "nights").rglob("plan.json")]
    assert (line["kind"], line["night"], len(plans)) == ("commitments", NIGHT, 2)
    assert line["commitments"] == sorted(plan["draw"]["commitment"] for plan in plans)
    assert b"host" not in seen[0].lower()
    ended = weighbridge_cli("publish", "--runs", tmp_path / "nights", "--out", site, "--notice-days", 0, "--key", key)
    assert ended.code == WHOLE, ended.said
    assert len([line for line in lines_of(site) if line["kind"] == "commitments"]) == 1
    for slug in ("first-host", "second-host"):
        assert "It was in the log before the audit began" in (site / "endpoints" / slug / "index.html").read_text(
            "utf-8"
        )
    latest = json.loads((site / "latest.json").read_bytes())["endpoints"]
    assert [one["committed_before"] for one in latest] == [True, True]


def test_a_draw_that_was_entered_afterwards_is_said_to_prove_nothing(
    publish: Publish, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it_is(monkeypatch, datetime.now(UTC) + timedelta(hours=1))
    assert publish().code == WHOLE
    assert next(line["kind"] for line in lines_of(site)) == "commitments"
    for slug in (PLAIN, FAR):
        assert "was not in the log before the audit began" in (site / "endpoints" / slug / "index.html").read_text(
            "utf-8"
        )


def test_a_site_that_cannot_be_used_stops_the_night_before_anything_is_asked(
    weighbridge_cli: Weighbridge, signed: Path, stranger: Path, tmp_path: Path
) -> None:
    before = tree(signed)
    with FaultServer(well_formed) as server:
        fleet = write_fleet(tmp_path, table("First host", server.base_url))
        for options in ((), ("--key", stranger)):
            ended = weighbridge_cli("nightly", fleet, "--out", tmp_path / "nights", "--site", signed, *options)
            assert (ended.code, len(ended.err.splitlines()) <= 2) == (CHANGED, True)
        assert server.requests == []
    assert tree(signed) == before


# -- what reaches a terminal -----------------------------------------------------------------------------------


def test_nothing_hostile_reaches_the_terminal_of_who_verifies(
    signed: Path, verify: Callable[..., Ended], stranger: Path, tmp_path: Path
) -> None:
    files = unpacked(report_of(signed) / "evidence.zip")
    plan, verdict = json.loads(files["plan.json"]), json.loads(files["verdict.json"])
    plan["endpoint"]["name"] = verdict["sentence"] = verdict["weighbridge_version"] = STEERING
    far = unpacked(report_of(signed, FAR) / "evidence.zip")
    far_plan = json.loads(far["plan.json"])
    far_plan["reference"]["id"] = STEERING
    control = json.dumps(plan | {STEERING: 1}).encode()
    alone = tmp_path / "alone.zip"
    for held in (
        files | {"plan.json": json.dumps(plan).encode(), "verdict.json": json.dumps(verdict).encode()},
        far | {"plan.json": json.dumps(far_plan).encode()},
        files | {"controls/honest/plan.json": control},
        files | {"plan.json": json.dumps(plan | {STEERING: 1}).encode()},
    ):
        alone.write_bytes(resealed(held, stranger))
        for form in ((), ("--json",)):
            ended = verify(alone, *form)
            assert ended.code != WHOLE
            for text in (ended.out, ended.err):
                assert text.replace("\n", "").isprintable()


def test_nothing_hostile_in_a_log_reaches_the_terminal(
    signed: Path, verify: Callable[..., Ended], stranger: Path
) -> None:
    log, whole = signed / LOG, (signed / LOG).read_bytes()
    for field in ({STEERING: 1}, {"kind": STEERING}, {"at": STEERING}, {"endpoint": STEERING}):
        lines = lines_of(signed)
        number = next(n for n, line in enumerate(lines) if line["kind"] == "report")
        log.write_bytes(
            b"".join(json.dumps(line | (field if n == number else {})).encode() + b"\n" for n, line in enumerate(lines))
        )
        for path in (signed, report_of(signed)):
            ended = verify(path)
            assert ended.code == CHANGED
            assert ended.err.replace("\n", "").isprintable(), field
        log.write_bytes(whole)


@pytest.mark.parametrize("comment", ["a\x1b]0;t\x07b", "a\u202eb", "a\x9bb"])
def test_a_key_whose_comment_steers_is_no_key(
    comment: str, signed: Path, weighbridge_cli: Weighbridge, tmp_path: Path
) -> None:
    file = tmp_path / "key.pub"
    file.write_text(TrustedKey(b"0" * 32, comment).line, "utf-8")
    ended = weighbridge_cli("verify", signed, "--trusted-key", file)
    assert (ended.code, "not a public key" in ended.err) == (CHANGED, True)
    assert ended.err.replace("\n", "").isprintable()


def test_what_is_sealed_is_known_by_name(root: Path) -> None:
    """Every name that evidence can hold is one that `verify` expects, and nothing else of the run folder is in it."""
    folder = root / NIGHT / PLAIN
    with zipfile.ZipFile(io.BytesIO(seal(folder, None, None))) as archive:
        assert set(archive.namelist()) <= NAMES
        assert "owner" not in archive.namelist()
    assert enter.EVIDENCE == "evidence.zip"
