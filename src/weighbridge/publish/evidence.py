"""evidence.zip: all that a stranger needs to judge one audit again, and a signed statement of every file's digest.

The same run gives the same bytes. What is taken out before it is published (a local path, the name of a key's variable, what a router
says of the auditor's own account) is stated, with the digest that the file had before.
"""

import io
import json
import re
import stat
import zipfile
import zlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from weighbridge.attest import (
    SignatureState,
    Statement,
    TrustedKey,
    sign_statement,
    statement_bytes,
    unsigned,
    verify_statement,
)
from weighbridge.canonical import canonical_bytes, sha256_hex
from weighbridge.dialects.routes import LISTING, RECORD_FIELDS, RECORDS
from weighbridge.errors import EvidenceError, RunFolderError, SignatureError
from weighbridge.records import Findings, Plan, Verdict
from weighbridge.reference.bundle import EMBEDDED
from weighbridge.store import plan_bytes

STATEMENT = "statement.json"
MANIFEST = "reference.json"
REPORT_TYPE = "urn:weighbridge:report:1"
# What a run is judged from, what it was judged to be, and the page that shows it.
JUDGED_FROM = ("plan.json", "exchanges.jsonl")
JUDGED_TO = ("observations.jsonl", "findings.json", "verdict.json")
SHOWN_AS = ("report.html",)
CONTROLS = ("controls/honest", "controls/altered")
NAMES = frozenset(
    [*JUDGED_FROM, *JUDGED_TO, *SHOWN_AS, MANIFEST, STATEMENT, *(f"{c}/{n}" for c in CONTROLS for n in (*JUDGED_FROM, *JUDGED_TO))]
)  # fmt: skip
MOST_BYTES = 512 * 2**20  # of all files together, unpacked
MOST_DOCUMENT_BYTES = 16 * 2**20  # of one that is read as one JSON value, which takes many times its size in memory
MOST_LINE_BYTES = 64 * 2**20
_WHEN = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file knows: what is the same has the same bytes
_LEVEL = 3  # a tenth larger than the usual one, in half the time


@dataclass(frozen=True)
class Evidence:
    """An opened evidence.zip whose files are what its statement says."""

    sha256: str
    files: dict[str, bytes]
    statement: Statement
    signature: SignatureState


def seal(folder: Path, manifest: bytes | None, key_file: Path | None) -> bytes:
    """The evidence of a judged run folder, signed where there is a key.

    Parameters
    ----------
    folder : pathlib.Path
        Its reports are in it.
    manifest : bytes, optional
        Canonical, of the reference bundle that the run was judged by.
    key_file : pathlib.Path, optional
        An Ed25519 private key, as `weighbridge reference keygen` makes it.

    Raises
    ------
    RunFolderError
        If the folder lacks a file, or holds one that cannot be read.
    """
    files: dict[str, bytes] = {}
    redactions: list[dict[str, str]] = []
    plans: dict[str, Plan] = {}
    for place in ("", *CONTROLS):
        if place and not (folder / place).is_dir():
            continue
        for name in (*JUDGED_FROM, *JUDGED_TO, *(SHOWN_AS if not place else ())):
            full = f"{place}/{name}" if place else name
            data = _file(folder / full)
            shown, what = data, None
            if name == "plan.json":
                plans[place], shown, what = _public_plan(data)
            elif name == "exchanges.jsonl":
                shown, what = _public_exchanges(data, plans[place].endpoint.model)
            files[full] = shown
            if what is not None:
                redactions.append({"file": full, "sha256_before": sha256_hex(data), "taken_out": what})
    if manifest is not None:
        files[MANIFEST] = manifest
    _fits(files, str(folder))
    plan = plans[""]
    verdict = Verdict.model_validate_json(files["verdict.json"])
    # Pages are made of these: what cannot be shown is not entered.
    Findings.model_validate_json(files["findings.json"])
    began = json.loads(files["exchanges.jsonl"].partition(b"\n")[0] or b"{}").get("sent_at")
    if began is not None and datetime.fromisoformat(began).tzinfo is None:
        raise RunFolderError(f"{folder / 'exchanges.jsonl'}: sent_at names no zone", "Restore the file")
    predicate = {
        "weighbridge_version": verdict.weighbridge_version, "run_id": plan.run_id, "created_at": plan.created_at,
        "endpoint": {"name": plan.endpoint.name, "base_url": plan.endpoint.base_url, "model": plan.endpoint.model},
        "verdict": verdict.verdict, "cause": verdict.cause, "policy": {"id": plan.policy.id, "version": plan.policy.version},
        "reference": plan.reference.model_dump() if plan.reference is not None else None,
        "pool": plan.pool.model_dump() if plan.pool is not None else None,
        "commitment": plan.draw.commitment, "redactions": redactions,
        "says": "These are the exchanges that the signer recorded and judged. A signature does not prove that the endpoint sent them.",
    }  # fmt: skip
    payload = statement_bytes({name: sha256_hex(data) for name, data in sorted(files.items())}, REPORT_TYPE, predicate)
    envelope = unsigned(payload) if key_file is None else sign_statement(payload, key_file)
    return _zip({**files, STATEMENT: canonical_bytes(envelope)})


def read_evidence(data: bytes, where: str, trusted: list[TrustedKey]) -> Evidence:
    """Open an evidence.zip and hold every file against the signed statement.

    Raises
    ------
    EvidenceError
        Naming the file or the signature that is not as it was when it was sealed.
    """
    files = _unzip(data, where)
    sealed = files.pop(STATEMENT, None)
    if sealed is None:
        raise EvidenceError(f"{where} holds no {STATEMENT}", "Fetch it again")
    try:
        state, statement = verify_statement(json.loads(sealed), trusted)
    except (ValueError, RecursionError):
        raise EvidenceError(f"{where}: {STATEMENT} is not JSON", "Fetch it again") from None
    except SignatureError as error:
        raise EvidenceError(f"{where}: {error.what}", error.next_step) from None
    if statement.predicate_type != REPORT_TYPE:
        raise EvidenceError(f"{where}: {STATEMENT} is not about a report", "Fetch it again")
    stated = statement.digests
    for name in sorted(stated.keys() | files.keys()):
        if name not in files:
            raise EvidenceError(f"{where}: {name} is missing", "Fetch it again")
        if name not in stated:
            raise EvidenceError(f"{where}: {name} was added; the statement does not know it", "Fetch it again")
        if sha256_hex(files[name]) != stated[name]:
            raise EvidenceError(f"{where}: {name} was changed; it is not what the statement says", "Fetch it again")
    for name in (*JUDGED_FROM, *JUDGED_TO):
        if name not in files:
            raise EvidenceError(f"{where}: {name} is missing", "Fetch it again")
    return Evidence(sha256_hex(data), files, statement, state)


def _fits(files: dict[str, bytes], where: str) -> None:
    """Refuse what nobody could open: it is bounded, so that a stranger's evidence fills no memory."""
    for name, data in files.items():
        if name.endswith(".json") and len(data) > MOST_DOCUMENT_BYTES:
            raise EvidenceError(f"{where}: {name} is larger than it can be", "Do not use it")
        if name.endswith(".jsonl") and max(map(len, data.split(b"\n"))) > MOST_LINE_BYTES:
            raise EvidenceError(f"{where}: {name} holds a line that is longer than one can be", "Do not use it")
    if sum(map(len, files.values())) > MOST_BYTES:
        raise EvidenceError(f"{where} holds more than evidence can", "Do not use it")


def _file(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise RunFolderError(f"{path} is not a file", "Restore it")
        return path.read_bytes()
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read ({error.strerror})", f"Judge the run again: weighbridge replay {path.parent}"
        ) from None


def _public_plan(data: bytes) -> tuple[Plan, bytes, str | None]:
    """A plan as it is published, its bytes, and what was taken out of it."""
    plan = Plan.model_validate_json(data)
    given = plan.endpoint
    named = plan.reference.id if plan.reference is not None else "not at hand"
    own: dict[str, str | None] = {"api_key_env": None}
    if given.reference is not None and given.reference not in EMBEDDED:
        own["reference"] = named
    if given.policy.endswith(".toml"):
        own["policy"] = plan.policy.id
    endpoint = given.model_copy(update=own)
    public = plan.model_copy(update={"reference_path": None, "endpoint": endpoint})
    if public == plan:
        return plan, data, None
    return public, plan_bytes(public), "the paths of reference and policy, the name of the key's variable"


def _public_exchanges(data: bytes, model: str) -> tuple[bytes, str | None]:
    """Exchanges as they are published: what a host says of itself holds things about the account of who asked."""
    lines = [*data.split(b"\n")[:-1], b""]  # a line that a crash cut short is judged by nobody
    public = b"\n".join(_without_account(line, model) if b'"route-' in line else line for line in lines)
    return public, "what is said of the auditor's own account" if public != data else None


def _without_account(line: bytes, model: str) -> bytes:
    """Leave of what a host says of itself what is judged of it, and nothing else."""
    event = json.loads(line)
    if not isinstance(event, dict):
        raise ValueError("a line that is no object")
    name, text = event.get("request_id"), event.get("body_text")
    if event.get("event") != "received" or name not in (LISTING, *RECORDS) or text is None:
        return line
    try:
        document = json.loads(text)
        kept = _judged(document, event.get("status"), name == LISTING, model)
        body = json.dumps(kept)
    except (ValueError, RecursionError):
        return line  # its first characters are what is judged of it
    return line if kept == document else canonical_bytes({**event, "body_text": body, "redacted": True})


def _judged(document: Any, status: int | None, is_listing: bool, model: str) -> Any:
    """Of an error its message, of a listing whether the model is there, of a router's record its few fields."""
    if not isinstance(document, dict):
        return [] if status == 200 else document
    error = document.get("error")
    if isinstance(error, dict) and error:
        told = {key: error[key] for key in ("message", "code") if error.get(key)}
        return {"error": told or {"message": None}} if told or status == 200 else document
    if error:
        return {"error": error}
    if status != 200:
        return document  # it is shown as it is
    data = document.get("data")
    if is_listing and isinstance(data, list):
        return {"data": [{"id": model} if isinstance(e, dict) and e.get("id") == model else {} for e in data]}
    if not isinstance(data, dict):
        return {}
    fields = ("id", "endpoints") if is_listing else RECORD_FIELDS  # a router's listing of one model is everybody's
    return {"data": {field: data[field] for field in fields if field in data}}


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _WHEN)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # whatever the system is
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name], compresslevel=_LEVEL)
    return buffer.getvalue()


def _unzip(data: bytes, where: str) -> dict[str, bytes]:
    """The files of an archive that is not trusted: known names only, once each, and no more bytes than are announced and allowed."""
    # An archive names each file with these four bytes; by chance alone they stand in the largest one once at most.
    if data.count(b"PK\x01\x02") > 2 * len(NAMES):
        raise EvidenceError(f"{where} holds more than evidence can", "Do not use it")
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > len(NAMES) or sum(info.file_size for info in infos) > MOST_BYTES:
                raise EvidenceError(f"{where} holds more than evidence can", "Do not use it")
            for info in infos:
                if info.filename.endswith(".json") and info.file_size > MOST_DOCUMENT_BYTES:
                    raise EvidenceError(f"{where} holds more than evidence can", "Do not use it")
                if info.filename not in NAMES or info.filename in files:
                    name = re.sub(r"[^A-Za-z0-9._/-]", "?", info.filename)[:80]
                    raise EvidenceError(f"{where} holds {name!r}, which no evidence does, or twice", "Do not use it")
                with archive.open(info) as file:
                    files[info.filename] = file.read(info.file_size + 1)
                if len(files[info.filename]) != info.file_size:
                    raise EvidenceError(f"{where}: {info.filename} is not as long as the archive says", "Do not use it")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise EvidenceError(f"{where} is no whole zip file ({error})", "Fetch it again") from None
    _fits(files, where)
    return files
