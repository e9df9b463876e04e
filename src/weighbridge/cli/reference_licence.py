"""weighbridge reference check-licence."""

import json
from pathlib import Path

import click

from weighbridge.canonical import sha256_hex
from weighbridge.cli.common import json_option
from weighbridge.errors import BundleError
from weighbridge.reference.bundle import load_bundle
from weighbridge.reference.licence import LicenceChange, LicenceRecord, bundled_text, compare_licence, read_text


def plain(text: str) -> str:
    """Text without what would steer a terminal: both licence and bundle may be a stranger's."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text.expandtabs(4))


def change_lines(record: LicenceRecord, change: LicenceChange) -> list[str]:
    """What changed, for people: one line a list item, safe for a terminal."""
    if change.same:
        return [plain(f"{record.identifier}: the same text")]
    if change.same_words:
        return [plain(f"{record.identifier}: the same words; only white space differs")]
    lines = [f"{record.identifier}: the text has changed; {len(change.kept)} of {len(record.asks)} quotes still stand"]
    lines += [f"lost ({ask.kind}, {ask.place}): {ask.quote}" for ask in change.lost]
    lines += [f"new obligation: {sentence}" for sentence in change.new_obligations]
    lines += change.diff
    if change.diff_lines_left_out:
        lines.append(f"{change.diff_lines_left_out} more lines of the diff are left out")
    return [plain(line) for line in lines]


@click.command("check-licence")
@click.argument("bundle_name", metavar="BUNDLE")
@click.argument("new_text", metavar="NEW_TEXT", type=click.Path(path_type=Path))
@json_option
def check_licence(bundle_name: str, new_text: Path, as_json: bool) -> int:
    """Compare a licence's text with the one that a bundle was recorded under.

    Exit codes: 0 the same words, 1 changed, 2 bad input.
    """
    bundle = load_bundle(bundle_name)
    record = bundle.manifest.licence
    if record is None:
        raise BundleError(
            f"{bundle_name} holds no licence text", "Record the bundle again with a [licence] table in its spec"
        )
    old = bundled_text(record, bundle.path)
    new = read_text(new_text)
    change = compare_licence(record, old, new.decode("utf-8"))
    if as_json:
        document = {
            "schema": "weighbridge/licence-check/1",
            "bundle": bundle.manifest.id,
            "digest": bundle.identity.digest,
            "identifier": record.identifier,
            "recorded_sha256": record.text_sha256,
            "new_sha256": sha256_hex(new),
            **change.model_dump(),
        }
        # In ASCII, so that a stranger's control characters stay escaped in a terminal and nothing is lost.
        click.echo(json.dumps(document, indent=1, sort_keys=True))
    else:
        for line in change_lines(record, change):
            click.echo(line)
    return 0 if change.same_words else 1
