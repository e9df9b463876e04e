"""Signed statements: an in-toto statement in a DSSE envelope, by Ed25519 (https://github.com/secure-systems-lab/dsse, in-toto Statement v1).

Trust comes from public keys that the user named, never from what is signed. The extra ``sign`` brings the mathematics; without it
everything else works, and what nobody signed can still be checked by its digests.
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
from weighbridge.errors import ConfigurationError, SignatureError
from weighbridge.paths import state_folder
from weighbridge.records import AnyRecord, Record, checked

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
KEY_WORD = "weighbridge-ed25519"


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


class Envelope(_Foreign):
    """What was signed, and by whom it says."""

    payload_type: Literal["application/vnd.in-toto+json"] = Field(alias="payloadType")
    payload: Annotated[bytes, BeforeValidator(_decoded)]
    signatures: list[_Signature] = Field(max_length=100)


class _Digest(_Foreign):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Subject(_Foreign):
    """One thing that a statement is about: its name and digest."""

    name: str = Field(default="", max_length=300)
    digest: _Digest


class Statement(_Foreign):
    """An in-toto statement."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[Subject] = Field(min_length=1, max_length=1000)
    predicate_type: str = Field(alias="predicateType", max_length=200)
    predicate: dict[str, Any] = Field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by name of the subject."""
        return {subject.name: subject.digest.sha256 for subject in self.subject}


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
    def line(self) -> str:
        """The key as a line of a file of public keys."""
        return f"{KEY_WORD} {base64.b64encode(self.raw).decode()} {self.comment}\n"

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
    _write_new(public_path, key.line.encode(), 0o644)
    _write_new(path, pem, 0o600)
    return key


def statement_bytes(subjects: dict[str, str], predicate_type: str, predicate: dict[str, Any]) -> bytes:
    """The canonical bytes of a statement about things, given as SHA-256 by name."""
    return canonical_bytes(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in subjects.items()],
            "predicateType": predicate_type,
            "predicate": predicate,
        }
    )


def sign_statement(payload: bytes, key_file: Path, earlier: object = None) -> dict[str, Any]:
    """Sign a statement's bytes; the signatures of an earlier envelope of the same bytes are kept.

    Raises
    ------
    ConfigurationError
        If the private key cannot be used, or the extra is missing.
    SignatureError
        If the earlier envelope is malformed or signs something else.
    """
    private = private_key(key_file)
    keyid = TrustedKey(private.public_key().public_bytes_raw(), "").keyid
    signatures = []
    if earlier is not None:
        envelope = _read(Envelope, earlier, "the earlier signature")
        if envelope.payload != payload:
            raise SignatureError("the earlier signature is of other contents", "Remove it and sign again")
        signatures = [(other.keyid, other.sig) for other in envelope.signatures if other.keyid != keyid]
    signatures.append((keyid, private.sign(pae(PAYLOAD_TYPE, payload))))
    return unsigned(payload) | {
        "signatures": [{"keyid": who, "sig": base64.b64encode(sig).decode()} for who, sig in signatures]
    }


def unsigned(payload: bytes) -> dict[str, Any]:
    """The envelope of a statement that nobody has signed."""
    return {"payloadType": PAYLOAD_TYPE, "payload": base64.b64encode(payload).decode(), "signatures": []}


def verify_statement(envelope: object, trusted: list[TrustedKey]) -> tuple[SignatureState, Statement]:
    """Who signed a statement, and what it says.

    Every signature is tried with every trusted key: a key id is a hint and proves nothing.

    Raises
    ------
    SignatureError
        If the envelope or the statement is malformed, or a signature in a trusted key's name is wrong.
    ConfigurationError
        If there is something to verify and the extra is missing.
    """
    read = _read(Envelope, envelope, "the signature")
    signed = pae(read.payload_type, read.payload)
    signers: dict[bytes, TrustedKey] = {}
    for signature in read.signatures:
        fitting = [key for key in trusted if _fits(key, signature.sig, signed)]
        named = [key for key in trusted if key.keyid == signature.keyid]
        if named and not fitting:
            raise SignatureError(f"the signature by {named[0].name} is wrong", "Do not use this copy")
        signers |= {key.raw: key for key in fitting}
    statement = _read(Statement, _json(read.payload, "the signed statement"), "the signed statement")
    if not read.signatures:
        return SignatureState("unsigned"), statement
    if signers:
        state = SignatureState("trusted", tuple(signers.values()), tuple(key.keyid for key in signers.values()))
        return state, statement
    return SignatureState("unknown_signer", (), tuple(signature.keyid for signature in read.signatures)), statement


def public_key_of(key_file: Path) -> TrustedKey:
    """The public key of a private key's file, called as the file beside it calls it."""
    raw = private_key(key_file).public_key().public_bytes_raw()
    known = public_key_in(Path(f"{key_file}.pub"))
    return known if known is not None and known.raw == raw else TrustedKey(raw, key_file.name)


def public_key_in(path: Path) -> TrustedKey | None:
    """The public key that a file of one line holds; None where it holds none."""
    try:
        return _public_key(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


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


def private_key(path: Path) -> "Ed25519PrivateKey":
    """Read a private key.

    Raises
    ------
    ConfigurationError
        If it cannot be used, others can read it, or the extra is missing.
    """
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
        raise SignatureError(f"{where} is not JSON", "Do not use this copy") from None


def _read(kind: type[AnyRecord], value: object, where: str) -> AnyRecord:
    try:
        return checked(kind, value, where)
    except ConfigurationError as error:
        raise SignatureError(error.what, "Do not use this copy") from None
