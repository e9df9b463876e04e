"""Signatures of reference bundles: a signed statement about the manifest's digest, beside the manifest."""

import json
import stat
from pathlib import Path
from typing import Any

from weighbridge.attest import (
    SignatureState,
    TrustedKey,
    sign_statement,
    statement_bytes,
    verify_statement,
)
from weighbridge.canonical import canonical_bytes
from weighbridge.errors import BundleError, SignatureError

FILE_NAME = "signature.json"
MAX_SIGNATURE_BYTES = 64 * 2**10
PREDICATE_TYPE = "urn:weighbridge:reference-bundle:1"
_FETCH = "Fetch the bundle again; do not use this copy"


def sign(
    manifest: dict[str, Any], digest: str, key_file: Path, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Sign a manifest, given as JSON with its digest; the signatures of an earlier envelope are kept.

    Raises
    ------
    ConfigurationError
        If the private key cannot be used, or the extra is missing.
    BundleError
        If the earlier envelope is malformed or signs something else.
    """
    predicate = {name: manifest[name] for name in ("id", "version", "model", "keeper", "arrays_sha256")}
    predicate |= {"pools": [{k: p[k] for k in ("id", "version", "sha256")} for p in manifest["pools"]]}
    try:
        signed = sign_statement(statement_bytes({manifest["id"]: digest}, PREDICATE_TYPE, predicate), key_file, earlier)
    except SignatureError as error:
        raise BundleError(error.what, f"Remove {FILE_NAME} and sign again") from None
    if len(canonical_bytes(signed)) > MAX_SIGNATURE_BYTES:
        raise BundleError(
            f"{FILE_NAME} would be larger than {MAX_SIGNATURE_BYTES // 2**10} KiB", "Shorten the manifest"
        )
    return signed


def read_envelope(folder: Path) -> dict[str, Any] | None:
    """The envelope of a bundle's folder; None where nobody signed.

    Raises
    ------
    BundleError
        If it is no regular file, is larger than 64 KiB, or is not a JSON object.
    """
    path = folder / FILE_NAME
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BundleError(f"{path} is not a file", _FETCH)
        with path.open("rb") as file:
            data = file.read(MAX_SIGNATURE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})", "Check the file") from None
    if len(data) > MAX_SIGNATURE_BYTES:
        raise BundleError(f"{path} is larger than a signature can be", _FETCH)
    value = _json(data, str(path))
    if not isinstance(value, dict):
        raise BundleError(f"{path} is not a JSON object", _FETCH)
    return value


def verify_signature(envelope: object, digest: str, trusted: list[TrustedKey]) -> SignatureState:
    """Who signed the manifest with this digest; None as the envelope means that nobody did.

    Raises
    ------
    BundleError
        If the envelope is malformed, names another digest, or a signature in a trusted key's name is wrong.
    ConfigurationError
        If there is something to verify and the extra is missing.
    """
    if envelope is None:
        return SignatureState("unsigned")
    try:
        state, statement = verify_statement(envelope, trusted)
    except SignatureError as error:
        raise BundleError(error.what, _FETCH) from None
    if state.state == "unsigned":
        raise BundleError(f"{FILE_NAME} holds no signature", _FETCH)
    if statement.predicate_type != PREDICATE_TYPE or len(statement.subject) != 1:
        raise BundleError("the signed statement is not about a bundle", _FETCH)
    if statement.subject[0].digest.sha256 != digest:
        raise BundleError("the signature is of another bundle: it names another digest", _FETCH)
    return state


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise BundleError(f"{where} is not JSON", _FETCH) from None
