"""The command line: one file a command. stdout is data, stderr is talk."""

import sys
import traceback
from pathlib import Path

import click

from weighbridge import __version__
from weighbridge.cli.audit import audit_command
from weighbridge.cli.demo import demo_command
from weighbridge.cli.dispute import dispute_command
from weighbridge.cli.doctor import doctor_command
from weighbridge.cli.history import history_command
from weighbridge.cli.lab import lab_group
from weighbridge.cli.nightly import merge_command, nightly_command
from weighbridge.cli.plan import plan_command
from weighbridge.cli.pool import pool_group
from weighbridge.cli.power import power_command
from weighbridge.cli.publish import publish_command
from weighbridge.cli.reference import reference_group
from weighbridge.cli.replay import replay_command
from weighbridge.cli.resume import resume_command
from weighbridge.cli.verify import verify_command
from weighbridge.errors import WeighbridgeError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="weighbridge")
def cli() -> None:
    """Weigh hosted language-model endpoints against recorded runs of the original weights.

    Exit codes: 0 consistent, 1 differs, 2 usage or configuration, 3 inconclusive, 4 endpoint unreachable or
    refused, 5 budget exhausted before an answer, 130 interrupted, 70 a fault of Weighbridge's own.
    """


for _command in (
    demo_command, audit_command, plan_command, power_command, doctor_command, resume_command, replay_command, reference_group, pool_group,
    lab_group, nightly_command, merge_command, history_command, publish_command, dispute_command, verify_command,
):  # fmt: skip
    cli.add_command(_command)


def main() -> None:
    """Run the command line; every error of ours is one line and an exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.Abort:
        code = 130
        click.echo("interrupted", err=True)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except WeighbridgeError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
        click.echo("interrupted", err=True)
    except Exception as error:  # noqa: BLE001 - exit code 1 says "differs": a fault of ours must never say that
        place = traceback.extract_tb(error.__traceback__)[-1]
        code = 70
        where = f"{Path(place.filename).name}, line {place.lineno}"
        click.echo(
            f"error: a fault of Weighbridge's own ({type(error).__name__} in {where}). Please report it; what was collected is kept",
            err=True,
        )
    sys.exit(code if isinstance(code, int) else 0)
