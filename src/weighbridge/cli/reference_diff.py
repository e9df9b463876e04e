"""weighbridge reference diff."""

import click

from weighbridge.cli.common import json_option, print_json
from weighbridge.cli.reference_licence import plain
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.reference.compare import Difference, differences

SHOWN_NAMES = 5


@click.command("diff")
@click.argument("old_name", metavar="A")
@click.argument("new_name", metavar="B")
@json_option
def diff_command(old_name: str, new_name: str, as_json: bool) -> int:
    """Show what changed from bundle A to bundle B.

    Exit codes: 0 the same, 1 changed, 2 bad input.
    """
    old, new = load_bundle(old_name), load_bundle(new_name)
    found = differences(old, new)
    if as_json:
        document = {
            "schema": "weighbridge/reference-diff/1", "old": _identity(old), "new": _identity(new), "same": not found,
            "differences": [difference.model_dump() for difference in found],
        }  # fmt: skip
        print_json(document, ascii_only=True)
    else:
        for difference in found:
            click.echo(plain(difference_line(difference)))
        if not found:
            click.echo(f"{old.manifest.id}: the same, digest {old.identity.digest}")
    return 1 if found else 0


def difference_line(difference: Difference) -> str:
    """One difference in words."""
    line = f"{difference.change} {difference.kind}: {difference.name}"
    if difference.detail:
        line += f": {difference.detail}"
    if difference.names:
        more = len(difference.names) - SHOWN_NAMES
        line += f" ({', '.join(difference.names[:SHOWN_NAMES])}{f' and {more} more' if more > 0 else ''})"
    return line


def _identity(bundle: Bundle) -> dict[str, object]:
    return {"id": bundle.manifest.id, "version": bundle.manifest.version, "digest": bundle.identity.digest}
