"""weighbridge reference keygen and sign, and what `reference verify` says about a signature."""

from collections.abc import Iterable
from pathlib import Path

import click

from weighbridge.attest import SignatureState, new_key, trusted_keys
from weighbridge.canonical import canonical_bytes, write_atomically
from weighbridge.errors import ConfigurationError
from weighbridge.reference.bundle import load_bundle
from weighbridge.reference.signature import FILE_NAME, read_envelope, sign, verify_signature

trusted_key_option = click.option(
    "--trusted-key", "trusted_key_files", metavar="FILE.pub", multiple=True, type=click.Path(path_type=Path),
    help="A public key that you trust; may be given again. Your file trusted-signers is read as well.",
)  # fmt: skip


@click.command("keygen")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--comment", help="What the key is called. Default: the file's name.")
def keygen_command(path: Path, comment: str | None) -> int:
    """Make a key to sign bundles with: PATH, which stays with you, and PATH.pub for those who trust you."""
    key = new_key(path, comment)
    click.echo(f"{path}: private key of {key.name}; hand out {path}.pub")
    return 0


@click.command("sign")
@click.argument("bundle_name", metavar="BUNDLE")
@click.option(
    "--key", "key_file", required=True, type=click.Path(path_type=Path), help="The private key that keygen made."
)
def sign_command(bundle_name: str, key_file: Path) -> int:
    """Check a bundle's hashes and sign its digest; the signatures of others are kept."""
    bundle = load_bundle(bundle_name)
    if _inside(key_file, bundle.path):
        raise ConfigurationError(f"the private key {key_file} stands inside the bundle", "Move it out")
    manifest = bundle.manifest.model_dump(mode="json", by_alias=True)
    envelope = sign(manifest, bundle.identity.digest, key_file, read_envelope(bundle.path))
    path = bundle.path / FILE_NAME
    try:
        write_atomically(path, canonical_bytes(envelope))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror})", "Check the folder") from None
    click.echo(f"{bundle.manifest.id}: digest {bundle.identity.digest} signed, in {path}")
    return 0


def signature_line(folder: Path, digest: str, trusted_key_files: Iterable[Path]) -> tuple[SignatureState, str]:
    """Who signed a whole bundle, and that in words; `SignatureState.exit_code` says what `verify` ends with.

    Raises
    ------
    BundleError
        If the signature is malformed, wrong, or of another bundle.
    ConfigurationError
        If a trusted key cannot be read or stands inside the bundle, or the extra is missing.
    """
    for file in (files := list(trusted_key_files)):
        if _inside(file, folder):
            raise ConfigurationError(f"{file} stands inside the bundle that it is to vouch for", "Get it elsewhere")
    state = verify_signature(read_envelope(folder), digest, trusted_keys(files))
    if state.state == "trusted":
        return state, "whole, signed by " + ", ".join(key.name for key in state.signers)
    if state.state == "unknown_signer":
        keyids = ", ".join(keyid or "no key id" for keyid in state.keyids)
        return state, f"whole, but signed by someone unknown ({keyids}); name a key that you trust with --trusted-key"
    return state, "whole, unsigned"


def _inside(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())
