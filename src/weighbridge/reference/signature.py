"""Signatures of reference bundles: an in-toto statement about the manifest's digest, in a DSSE envelope, by Ed25519.

Trust comes from public keys that the user named, never from a bundle. The extra ``sign`` brings the mathematics;
without it everything else works, and a bundle that nobody signed can still be verified.
"""

import base64
import importlib.util
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from weighbridge.canonical import canonical_bytes, sha256_hex
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.paths import state_folder
from weighbridge.records import AnyRecord, Record, checked

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FILE_NAME = "signature.json"
MAX_SIGNATURE_BYTES = 64 * 2**10
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:weighbridge:reference-bundle:1"
KEY_WORD = "weighbridge-ed25519"
_FETCH = "Fetch the bundle again; do not use this copy"


def _decoded(value: object) -> bytes:
    try:
        if isinstance(value, str):
            return base64.b64decode(value.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:
        pass
    raise ValueError("must be base64")


class _Foreign(Record):
    """A record of a format that others extend: DSSE and in-toto want unknown fields to be ignored."""

    model_config = Record.model_config | {"extra": "ignore"}


class _Signature(_Foreign):
    keyid: str = Field(default="", pattern=r"^[A-Za-z0-9:+/=_.-]{0,128}$")
    sig: Annotated[bytes, BeforeValidator(_decoded)] = Field(min_length=1)


class _Envelope(_Foreign):
    payload_type: Literal["application/vnd.in-toto+json"] = Field(alias="payloadType")
    payload: Annotated[bytes, BeforeValidator(_decoded)]
    signatures: list[_Signature] = Field(min_length=1)


class _Digest(_Foreign):
    sha256: str


class _Subject(_Foreign):
    digest: _Digest


class _Statement(_Foreign):
    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[_Subject] = Field(min_length=1, max_length=1)
    predicate_type: Literal["urn:weighbridge:reference-bundle:1"] = Field(alias="predicateType")


@dataclass(frozen=True)
class TrustedKey:
    """A public key of 32 bytes, and what its owner calls it."""

    raw: bytes
    comment: str

    @property
    def keyid(self) -> str:
        """The first 16 bytes of the key's SHA-256, in hexadecimal digits."""
        return sha256_hex(self.raw)[:32]

    @property
    def name(self) -> str:
        """The key for people."""
        return f"{self.comment or 'a key without a name'} ({self.keyid})"


@dataclass(frozen=True)
class SignatureState:
    """Who signed: the trusted keys where there are any, else the key ids that an envelope names."""

    state: Literal["unsigned", "trusted", "unknown_signer"]
    signers: tuple[TrustedKey, ...] = ()
    keyids: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """What `verify` exits with: 3 where somebody signed whom the user does not know."""
        return 3 if self.state == "unknown_signer" else 0


def pae(payload_type: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding, version 1."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def new_key(path: Path, comment: str | None = None) -> TrustedKey:
    """Make a private key at `path`, which only its owner can read, and the public key beside it in ``path.pub``.

    Raises
    ------
    ConfigurationError
        If either file exists or cannot be written, the comment is not one short line, or the extra is missing.
    """
    _need_extra()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    comment = (path.name if comment is None else comment).strip()
    if not comment.isprintable() or len(comment) > 120:
        raise ConfigurationError("the comment is not one line of at most 120 characters", "Choose a shorter name")
    public_path = Path(f"{path}.pub")
    for file in (path, public_path):
        if os.path.lexists(file):
            raise ConfigurationError(f"{file} exists and is not overwritten", "Choose another path")
    private = Ed25519PrivateKey.generate()
    key = TrustedKey(private.public_key().public_bytes_raw(), comment)
    pem = private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    _write_new(public_path, f"{KEY_WORD} {base64.b64encode(key.raw).decode()} {comment}\n".encode(), 0o644)
    _write_new(path, pem, 0o600)
    return key


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
    private = _private_key(key_file)
    keyid = TrustedKey(private.public_key().public_bytes_raw(), "").keyid
    predicate = {name: manifest[name] for name in ("id", "version", "model", "keeper", "arrays_sha256")}
    payload = canonical_bytes(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": manifest["id"], "digest": {"sha256": digest}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                **predicate,
                "pools": [{k: p[k] for k in ("id", "version", "sha256")} for p in manifest["pools"]],
            },
        }
    )
    signatures = []
    if earlier is not None:
        envelope = _read(_Envelope, earlier, "the earlier signature")
        if envelope.payload != payload:
            raise BundleError("the earlier signature is of other contents", f"Remove {FILE_NAME} and sign again")
        signatures = [(other.keyid, other.sig) for other in envelope.signatures if other.keyid != keyid]
    signatures.append((keyid, private.sign(pae(PAYLOAD_TYPE, payload))))
    signed = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": who, "sig": base64.b64encode(sig).decode()} for who, sig in signatures],
    }
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

    Every signature is tried with every trusted key: a key id is a hint and proves nothing.

    Raises
    ------
    BundleError
        If the envelope is malformed, names another digest, or a signature in a trusted key's name is wrong.
    ConfigurationError
        If there is something to verify and the extra is missing.
    """
    if envelope is None:
        return SignatureState("unsigned")
    read = _read(_Envelope, envelope, "the signature")
    signed = pae(read.payload_type, read.payload)
    signers: dict[bytes, TrustedKey] = {}
    for signature in read.signatures:
        fitting = [key for key in trusted if _fits(key, signature.sig, signed)]
        named = [key for key in trusted if key.keyid == signature.keyid]
        if named and not fitting:
            raise BundleError(f"the signature by {named[0].name} is wrong", _FETCH)
        signers |= {key.raw: key for key in fitting}
    statement = _read(_Statement, _json(read.payload, "the signed statement"), "the signed statement")
    if statement.subject[0].digest.sha256 != digest:
        raise BundleError("the signature is of another bundle: it names another digest", _FETCH)
    if signers:
        return SignatureState("trusted", tuple(signers.values()), tuple(key.keyid for key in signers.values()))
    return SignatureState("unknown_signer", (), tuple(signature.keyid for signature in read.signatures))


def trusted_keys(files: Iterable[Path]) -> list[TrustedKey]:
    """The public keys that the user trusts: those of these files and of the user's own trust file.

    Raises
    ------
    ConfigurationError
        If a file cannot be read or a line of it is not a public key.
    """
    found: dict[bytes, TrustedKey] = {}
    own = state_folder() / "trusted-signers"
    for path in [*files, *([own] if own.exists() else [])]:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise ConfigurationError(f"{path} cannot be read as a file of public keys", "Check the path") from None
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.lstrip().startswith("#"):
                key = _public_key(line)
                if key is None:
                    raise ConfigurationError(
                        f"{path}, line {number}: not a public key", f"Each line is: {KEY_WORD} BASE64 comment"
                    )
                found.setdefault(key.raw, key)
    return list(found.values())


def _public_key(line: str) -> TrustedKey | None:
    word, encoded, comment = (*line.strip().split(maxsplit=2), "", "", "")[:3]
    try:
        raw = _decoded(encoded)
    except ValueError:
        return None
    return TrustedKey(raw, comment) if word == KEY_WORD and len(raw) == 32 and comment.isprintable() else None


def _private_key(path: Path) -> "Ed25519PrivateKey":
    _need_extra()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigurationError(f"others can read the private key {path}", f"Run: chmod 600 {path}")
            data = file.read()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})", "Check the path") from None
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(
            f"{path} is not an Ed25519 private key in PEM without a password",
            "Make one: weighbridge reference keygen PATH",
        )
    return key


def _fits(key: TrustedKey, signature: bytes, signed: bytes) -> bool:
    _need_extra()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, signed)
    except (InvalidSignature, ValueError):
        return False
    return True


def _need_extra() -> None:
    if importlib.util.find_spec("cryptography") is None:
        raise ConfigurationError("signatures need the extra `sign`", "Install it: pip install 'weighbridge[sign]'")


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror})", "Choose another path") from None


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise BundleError(f"{where} is not JSON", _FETCH) from None


def _read(kind: type[AnyRecord], value: object, where: str) -> AnyRecord:
    try:
        return checked(kind, value, where)
    except ConfigurationError as error:
        raise BundleError(error.what, _FETCH) from None
