"""weighbridge reference: the group; each command has a file of its own."""

import click

from weighbridge.cli.reference_build import build_command
from weighbridge.cli.reference_diff import diff_command
from weighbridge.cli.reference_licence import check_licence
from weighbridge.cli.reference_merge import merge_command
from weighbridge.cli.reference_show import show_command
from weighbridge.cli.reference_sign import keygen_command, sign_command
from weighbridge.cli.reference_verify import verify_command


@click.group("reference")
def reference_group() -> None:
    """Build, show, verify, merge, compare and sign reference bundles."""


for _command in (
    build_command, show_command, verify_command, merge_command, diff_command, check_licence, keygen_command, sign_command,
):  # fmt: skip
    reference_group.add_command(_command)
