"""Signatures of bundles: what is signed, who is trusted, and what becomes of a wrong one."""

import base64
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st

from weighbridge.attest import PAYLOAD_TYPE, TrustedKey, new_key, pae, trusted_keys
from weighbridge.canonical import canonical_bytes, sha256_hex
from weighbridge.cli.reference_sign import keygen_command, sign_command, signature_line
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.paths import data_path
from weighbridge.reference.bundle import load_bundle
from weighbridge.reference.signature import FILE_NAME, MAX_SIGNATURE_BYTES, read_envelope, sign, verify_signature

MANIFEST: dict[str, Any] = {
    "id": "small", "version": 3, "model": "Small-1B", "keeper": "a keeper", "arrays_sha256": "ab" * 32,
    "pools": [{"id": "chat", "version": 1, "sha256": "cd" * 32}],
}  # fmt: skip
DIGEST = sha256_hex(canonical_bytes(MANIFEST))
TRUSTED = TrustedKey(Ed25519PrivateKey.generate().public_key().public_bytes_raw(), "somebody")
UNKNOWN_SIGNER = 3


@pytest.fixture(autouse=True)
def nobody_is_trusted(own_home: Path) -> None:
    """A trust file of its own for each test."""


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keeper"


@pytest.fixture
def key(key_file: Path) -> TrustedKey:
    return new_key(key_file, "A Keeper")


@pytest.fixture
def envelope(key: TrustedKey, key_file: Path) -> dict[str, Any]:
    return sign(MANIFEST, DIGEST, key_file)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(data_path("reference_outputs/smollm2-135m-instruct"), folder)
    return folder


def digest_of(bundle: Path) -> str:
    return load_bundle(str(bundle)).identity.digest


def run_sign(bundle: Path, key_file: Path) -> None:
    assert sign_command.main([str(bundle), "--key", str(key_file)], standalone_mode=False) == 0


def flipped(encoded: str) -> str:
    raw = bytearray(base64.b64decode(encoded))
    raw[len(raw) // 2] ^= 1
    return base64.b64encode(raw).decode()


def statement_in(envelope: dict[str, Any]) -> dict[str, Any]:
    statement: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return statement


def signed_by(key_file: Path, payload: bytes, payload_type: str = PAYLOAD_TYPE) -> dict[str, Any]:
    """An envelope whose signature is right, whatever it holds."""
    private = load_pem_private_key(key_file.read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": base64.b64encode(private.sign(pae(payload_type, payload))).decode()}],
    }


# -- what is signed ------------------------------------------------------------------------------------------------


def test_pae_is_the_one_of_the_dsse_specification() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_pae_counts_bytes() -> None:
    assert pae("é", b"\x00\n") == b"DSSEv1 2 \xc3\xa9 2 \x00\n"


def test_the_envelope_is_dsse_around_an_in_toto_statement_that_others_can_verify(
    envelope: dict[str, Any], key: TrustedKey
) -> None:
    payload = base64.b64decode(envelope["payload"])
    assert json.loads(payload) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "small", "digest": {"sha256": DIGEST}}],
        "predicateType": "urn:weighbridge:reference-bundle:1",
        "predicate": MANIFEST,
    }
    assert payload == canonical_bytes(json.loads(payload))
    assert set(envelope) == {"payloadType", "payload", "signatures"}
    (signature,) = envelope["signatures"]
    assert signature["keyid"] == sha256_hex(key.raw)[:32]
    said = b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload)
    Ed25519PublicKey.from_public_bytes(key.raw).verify(base64.b64decode(signature["sig"]), said)


# -- who is trusted ------------------------------------------------------------------------------------------------


def test_a_signature_of_a_trusted_key_is_trusted(envelope: dict[str, Any], key: TrustedKey) -> None:
    state = verify_signature(envelope, DIGEST, [TRUSTED, key])
    assert (state.state, state.signers, state.keyids, state.exit_code) == ("trusted", (key,), (key.keyid,), 0)


def test_a_signature_of_another_key_is_of_an_unknown_signer(envelope: dict[str, Any], key: TrustedKey) -> None:
    for trusted in ([], [TRUSTED]):
        state = verify_signature(envelope, DIGEST, trusted)
        assert (state.state, state.signers, state.keyids) == ("unknown_signer", (), (key.keyid,))
        assert state.exit_code == UNKNOWN_SIGNER


def test_no_envelope_is_unsigned() -> None:
    state = verify_signature(None, DIGEST, [TRUSTED])
    assert (state.state, state.exit_code) == ("unsigned", 0)


def test_of_two_signers_one_that_is_trusted_is_enough(
    envelope: dict[str, Any], key: TrustedKey, tmp_path: Path
) -> None:
    second = new_key(tmp_path / "second")
    both = sign(MANIFEST, DIGEST, tmp_path / "second", envelope)
    assert [s["keyid"] for s in both["signatures"]] == [key.keyid, second.keyid]
    assert verify_signature(both, DIGEST, [key]).signers == (key,)
    assert verify_signature(both, DIGEST, [second]).signers == (second,)
    assert verify_signature(both, DIGEST, [second, key]).signers == (key, second)
    assert verify_signature(both, DIGEST, []).keyids == (key.keyid, second.keyid)


def test_a_wrong_signature_in_a_trusted_name_is_an_error_beside_a_right_one(
    envelope: dict[str, Any], key: TrustedKey, tmp_path: Path
) -> None:
    second = new_key(tmp_path / "second")
    both = sign(MANIFEST, DIGEST, tmp_path / "second", envelope)
    both["signatures"][0]["sig"] = flipped(both["signatures"][0]["sig"])
    with pytest.raises(BundleError, match="A Keeper"):
        verify_signature(both, DIGEST, [second, key])
    assert verify_signature(both, DIGEST, [second]).signers == (second,)


def test_signing_twice_keeps_one_signature_a_key(envelope: dict[str, Any], key_file: Path) -> None:
    assert sign(MANIFEST, DIGEST, key_file, envelope) == envelope


def test_a_key_id_proves_nothing_and_is_not_needed(envelope: dict[str, Any], key: TrustedKey) -> None:
    del envelope["signatures"][0]["keyid"]
    assert verify_signature(envelope, DIGEST, [key]).state == "trusted"
    envelope["signatures"][0]["keyid"] = TRUSTED.keyid
    with pytest.raises(BundleError, match="somebody"):
        verify_signature(envelope, DIGEST, [TRUSTED])


def test_what_dsse_lets_others_add_is_ignored_and_url_safe_base64_is_read(
    envelope: dict[str, Any], key: TrustedKey
) -> None:
    envelope["extra"] = envelope["signatures"][0]["extra"] = 1
    for holder, name in ((envelope, "payload"), (envelope["signatures"][0], "sig")):
        holder[name] = holder[name].replace("+", "-").replace("/", "_")
    assert verify_signature(envelope, DIGEST, [key]).state == "trusted"


# -- what is wrong -------------------------------------------------------------------------------------------------


def test_a_tampered_payload_is_an_error(envelope: dict[str, Any], key: TrustedKey) -> None:
    statement = statement_in(envelope)
    statement["predicate"]["keeper"] = "somebody else"
    envelope["payload"] = base64.b64encode(canonical_bytes(statement)).decode()
    with pytest.raises(BundleError, match="A Keeper"):
        verify_signature(envelope, DIGEST, [key])


def test_a_tampered_signature_is_an_error(envelope: dict[str, Any], key: TrustedKey) -> None:
    (signature,) = envelope["signatures"]
    right = signature["sig"]
    for wrong in (flipped(right), right[:40], base64.b64encode(bytes(64)).decode()):
        signature["sig"] = wrong
        with pytest.raises(BundleError, match="is wrong"):
            verify_signature(envelope, DIGEST, [key])


@pytest.mark.parametrize("trusts", [True, False])
def test_a_signature_of_another_digest_is_an_error(envelope: dict[str, Any], key: TrustedKey, trusts: bool) -> None:
    with pytest.raises(BundleError, match="another digest"):
        verify_signature(envelope, "0" * 64, [key] if trusts else [])


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"predicateType": "https://slsa.dev/provenance/v1"},
        {"subject": []},
        {"subject": [{"digest": {"sha512": DIGEST}}]},
        {"subject": [{"digest": {"sha256": DIGEST}}, {"digest": {"sha256": "0" * 64}}]},
    ],
)
def test_a_statement_about_something_else_is_an_error_though_it_is_signed(
    envelope: dict[str, Any], key: TrustedKey, key_file: Path, change: dict[str, Any]
) -> None:
    statement = statement_in(envelope)
    assert verify_signature(signed_by(key_file, canonical_bytes(statement)), DIGEST, [key]).state == "trusted"
    with pytest.raises(BundleError, match="statement"):
        verify_signature(signed_by(key_file, canonical_bytes({**statement, **change})), DIGEST, [key])


def test_another_payload_type_is_an_error_though_it_is_signed(
    envelope: dict[str, Any], key: TrustedKey, key_file: Path
) -> None:
    payload = base64.b64decode(envelope["payload"])
    with pytest.raises(BundleError, match="payloadType"):
        verify_signature(signed_by(key_file, payload, "application/json"), DIGEST, [key])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
payloads = json_values.map(lambda value: base64.b64encode(json.dumps(value).encode()).decode()) | json_values
signatures = st.lists(st.fixed_dictionaries({"sig": json_values | st.just("AAAA")}, optional={"keyid": json_values}))
envelopes = st.fixed_dictionaries(
    {
        "payloadType": st.just(PAYLOAD_TYPE) | json_values,
        "payload": payloads,
        "signatures": signatures | json_values,
    }
)


@given(json_values | envelopes)
def test_json_of_any_shape_is_a_bundle_error(value: Any) -> None:
    if value is None:
        assert verify_signature(value, DIGEST, [TRUSTED]).state == "unsigned"
        return
    with pytest.raises(BundleError) as caught:
        verify_signature(value, DIGEST, [TRUSTED])
    assert str(caught.value).isprintable()


@given(json_values)
def test_a_signed_statement_of_any_shape_is_a_bundle_error(value: Any) -> None:
    payload = base64.b64encode(json.dumps(value).encode()).decode()
    envelope = {"payloadType": PAYLOAD_TYPE, "payload": payload, "signatures": [{"sig": "AAAA"}]}
    with pytest.raises(BundleError):
        verify_signature(envelope, DIGEST, [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"1" * 5000,
        b"[" * 60_000,
        b"{",
    ],
    ids=["empty", "not text", "null", "list", "long number", "deep", "cut"],
)
def test_a_file_that_is_no_envelope_is_a_bundle_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(BundleError, match=FILE_NAME):
        signature_line(tmp_path, DIGEST, [])


def test_an_oversized_file_is_a_bundle_error_though_it_is_right(
    tmp_path: Path, envelope: dict[str, Any], key: TrustedKey
) -> None:
    data = json.dumps(envelope).encode().ljust(MAX_SIGNATURE_BYTES)
    (tmp_path / FILE_NAME).write_bytes(data)
    assert read_envelope(tmp_path) == envelope
    (tmp_path / FILE_NAME).write_bytes(data + b" ")
    with pytest.raises(BundleError, match="larger than a signature"):
        read_envelope(tmp_path)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "folder" / FILE_NAME).mkdir(parents=True)
    os.mkfifo(tmp_path / FILE_NAME)
    for folder in (tmp_path, tmp_path / "folder"):
        with pytest.raises(BundleError, match="is not a file"):
            read_envelope(folder)


def test_an_envelope_that_could_not_be_read_again_is_not_made(key: TrustedKey, key_file: Path) -> None:
    with pytest.raises(BundleError, match="larger than 64 KiB"):
        sign({**MANIFEST, "keeper": "x" * MAX_SIGNATURE_BYTES}, DIGEST, key_file)


def test_an_earlier_signature_of_other_contents_is_not_overwritten(envelope: dict[str, Any], key_file: Path) -> None:
    with pytest.raises(BundleError, match="other contents"):
        sign(MANIFEST, "0" * 64, key_file, envelope)


# -- keys ----------------------------------------------------------------------------------------------------------


def test_a_new_key_is_the_owners_alone(key: TrustedKey, key_file: Path) -> None:
    assert key_file.stat().st_mode & 0o777 == 0o600
    line = Path(f"{key_file}.pub").read_text()
    assert line == f"weighbridge-ed25519 {base64.b64encode(key.raw).decode()} A Keeper\n"
    assert trusted_keys([Path(f"{key_file}.pub")]) == [key]


@pytest.mark.parametrize("existing", ["keeper", "keeper.pub"])
@pytest.mark.parametrize("dangling", [True, False])
def test_a_file_that_exists_is_not_overwritten(tmp_path: Path, existing: str, dangling: bool) -> None:
    path = tmp_path / existing
    if dangling:
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("mine")
    with pytest.raises(ConfigurationError, match="not overwritten"):
        new_key(tmp_path / "keeper")
    assert [file.name for file in tmp_path.iterdir()] == [existing]
    assert dangling or path.read_text() == "mine"


def test_a_file_that_appears_at_the_last_moment_is_not_overwritten(
    tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file.write_text("mine")
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    with pytest.raises(ConfigurationError, match="File exists"):
        new_key(key_file)
    assert key_file.read_text() == "mine"


@pytest.mark.parametrize("comment", ["two\nlines", "\x1b[2J", "x" * 121])
def test_a_comment_is_one_short_line(key_file: Path, comment: str) -> None:
    with pytest.raises(ConfigurationError, match="comment"):
        new_key(key_file, comment)
    assert not key_file.exists()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        new_key(tmp_path / "nowhere" / "keeper")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_private_key_that_others_can_reach_is_refused(key: TrustedKey, key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        sign(MANIFEST, DIGEST, key_file)


def test_what_is_not_an_ed25519_private_key_is_refused(tmp_path: Path, key: TrustedKey, key_file: Path) -> None:
    other = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    cut = key_file.read_bytes()[:60]
    for number, data in enumerate((b"", other, cut, Path(f"{key_file}.pub").read_bytes())):
        path = tmp_path / str(number)
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(ConfigurationError, match="is not an Ed25519 private key"):
            sign(MANIFEST, DIGEST, path)
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigurationError):
            sign(MANIFEST, DIGEST, path)


def test_trust_comes_from_the_users_own_file_as_well(own_home: Path, key: TrustedKey, key_file: Path) -> None:
    own = own_home / "state" / "trusted-signers"
    own.parent.mkdir(parents=True)
    lines = Path(f"{key_file}.pub").read_text()
    own.write_text(f"# who I know\n\n  # and more\n{lines}{lines}")
    assert trusted_keys([]) == [key]
    assert trusted_keys([Path(f"{key_file}.pub")]) == [key]
    namesake = new_key(key_file.with_name("namesake"), key.comment)
    assert trusted_keys([key_file.with_name("namesake.pub")]) == [namesake, key]


@pytest.mark.parametrize(
    "line",
    [
        "ssh-ed25519 AAAA me",
        "weighbridge-ed25519",
        "weighbridge-ed25519 AAAA short",
        "weighbridge-ed25519 !!!! me",
        f"weighbridge-ed25519 {base64.b64encode(bytes(32)).decode()} \x1b[2J",
    ],
)
def test_a_line_that_is_no_public_key_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "some.pub"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(ConfigurationError, match="line 2") as caught:
        trusted_keys([path])
    assert caught.value.what == f"{path}, line 2: not a public key"


def test_a_private_key_given_as_a_trusted_one_is_not_printed(key: TrustedKey, key_file: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        trusted_keys([key_file])
    assert not any(line in str(caught.value) for line in key_file.read_text().splitlines())


def test_without_the_extra_one_line_says_what_to_install(
    envelope: dict[str, Any], key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for needs in (
        lambda: new_key(key_file.with_name("other")),
        lambda: sign(MANIFEST, DIGEST, key_file),
        lambda: verify_signature(envelope, DIGEST, [TRUSTED]),
    ):
        with pytest.raises(ConfigurationError, match=r"pip install 'weighbridge\[sign\]'"):
            needs()
    assert verify_signature(None, DIGEST, [TRUSTED]).state == "unsigned"
    assert verify_signature(envelope, DIGEST, []).state == "unknown_signer"


# -- a bundle on the disk ------------------------------------------------------------------------------------------


def test_a_bundle_is_signed_and_verified(bundle: Path, key_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = digest_of(bundle)
    state, text = signature_line(bundle, digest, [])
    assert (state.exit_code, text) == (0, "whole, unsigned")

    assert keygen_command.main([str(key_file), "--comment", "A Keeper"], standalone_mode=False) == 0
    run_sign(bundle, key_file)
    assert digest in capsys.readouterr().out
    assert digest_of(bundle) == digest

    (key,) = trusted_keys([Path(f"{key_file}.pub")])
    state, text = signature_line(bundle, digest, [Path(f"{key_file}.pub")])
    assert (state.exit_code, text) == (0, f"whole, signed by A Keeper ({key.keyid})")
    state, text = signature_line(bundle, digest, [])
    assert state.exit_code == UNKNOWN_SIGNER
    assert text.startswith(f"whole, but signed by someone unknown ({key.keyid})")

    data = (bundle / FILE_NAME).read_bytes()
    assert data == canonical_bytes(json.loads(data))
    run_sign(bundle, key_file)
    assert (bundle / FILE_NAME).read_bytes() == data


def test_the_private_key_is_written_nowhere_but_in_its_file(
    bundle: Path, key: TrustedKey, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sign(bundle, key_file)
    pem = key_file.read_text().splitlines()[1]
    secret = base64.b64decode(pem)[-32:]
    assert Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == key.raw
    written = [file for file in bundle.parent.rglob("*") if file.is_file() and file != key_file]
    texts = [file.read_bytes() for file in written]
    texts += [base64.b64decode(json.loads((bundle / FILE_NAME).read_bytes())["payload"])]
    texts.append("".join(capsys.readouterr()).encode())
    for form in (secret, secret.hex().encode(), base64.b64encode(secret), pem.encode()):
        assert not any(form in text for text in texts)


def test_a_signature_does_not_travel_to_a_bundle_that_changed(bundle: Path, key: TrustedKey, key_file: Path) -> None:
    run_sign(bundle, key_file)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "keeper": "somebody else"}))
    for files in ([], [Path(f"{key_file}.pub")]):
        with pytest.raises(BundleError, match="another digest"):
            signature_line(bundle, digest_of(bundle), files)
    with pytest.raises(BundleError, match="other contents"):
        run_sign(bundle, key_file)


def test_nothing_inside_a_bundle_adds_trust(bundle: Path, key: TrustedKey, key_file: Path) -> None:
    run_sign(bundle, key_file)
    inside = bundle / "keeper.pub"
    for name in ("keeper.pub", "trusted-signers"):
        shutil.copy(f"{key_file}.pub", bundle / name)
    state, _ = signature_line(bundle, digest_of(bundle), [])
    assert state.state == "unknown_signer"
    with pytest.raises(ConfigurationError, match="inside the bundle"):
        signature_line(bundle, digest_of(bundle), [inside])


def test_a_private_key_inside_the_bundle_is_refused(bundle: Path) -> None:
    new_key(bundle / "keeper")
    with pytest.raises(ConfigurationError, match="inside the bundle"):
        run_sign(bundle, bundle / "keeper")
    assert not (bundle / FILE_NAME).exists()
