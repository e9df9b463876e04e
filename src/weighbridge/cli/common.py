"""What several commands share: the options that name an endpoint, progress, and how a judged run is shown."""

import json
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from weighbridge.audit import Progress as AuditProgress
from weighbridge.audit import collect_run, controls_of, judge_run
from weighbridge.errors import ConfigurationError, RunFolderError
from weighbridge.keys import key_for
from weighbridge.records import Endpoint, Findings, LogprobLevel, Plan, Verdict, checked, read_toml
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.report.document import make_report, report_json, write_report_json
from weighbridge.report.html import write_html
from weighbridge.report.junit import write_junit
from weighbridge.report.table import write_table
from weighbridge.report.terminal import print_summary
from weighbridge.store import RunFolder

Command = TypeVar("Command", bound=Callable[..., Any])
LINES_EVERY_REQUESTS = 10
talk = Console(stderr=True)

_ENDPOINT_OPTIONS = (
    click.argument("endpoint_file", required=False, metavar="[ENDPOINT.toml]", type=click.Path(path_type=Path)),
    click.option("--base-url", help="The endpoint's base URL, such as https://api.example.com/v1."),
    click.option("--model", help="The model's name as the endpoint spells it."),
    click.option("--reference", help="A reference bundle: its folder, or the name of an embedded one."),
    click.option("--policy", help="strict, kv8, int8-ok, fp8-ok, or a policy's .toml file. Default: strict."),
    click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the key."),
    click.option("--max-requests", type=int, help="Send at most so many requests, retries included. Default: 100."),
    click.option("--max-cost", type=float, metavar="USD", help="Spend at most so much; needs a [price] in the file."),
    click.option("--seed", help="The seed of the draw. Default: a fresh one."),
)
_COLLECTION_OPTIONS = (
    click.option("--level", type=click.Choice(get_args(LogprobLevel)), default="L3", show_default=True,
                 help="L3: one token a request. L2: a short answer. L1: the prompt's own logprobs, where the endpoint gives them."),
    click.option("--fleet-size", type=click.IntRange(1, 100_000), default=1, show_default=True,
                 help="How many endpoints are judged together; raises the evidence that names one."),
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")
fail_on_option = click.option(
    "--fail-on", type=click.Choice(["differs", "inconclusive", "never"]), default="differs", show_default=True,
    help="inconclusive: exit 1 instead of 3; never: exit 0 instead of 1 and 3.",
)  # fmt: skip


def endpoint_options(command: Command) -> Command:
    """Add the arguments that name an endpoint and a reference."""
    for option in reversed(_ENDPOINT_OPTIONS):
        command = option(command)
    return command


def collection_options(command: Command) -> Command:
    """Add what decides how evidence is collected."""
    for option in reversed(_COLLECTION_OPTIONS):
        command = option(command)
    return command


def endpoint_from(
    endpoint_file: Path | None,
    base_url: str | None,
    model: str | None,
    reference: str | None,
    policy: str | None,
    api_key_env: str | None,
    max_requests: int | None,
    max_cost: float | None,
) -> Endpoint:
    """Read the endpoint from its file or from the options; options win.

    Raises
    ------
    ConfigurationError
        If neither names an endpoint, or a value is wrong.
    """
    if endpoint_file is not None:
        if base_url is not None or model is not None:
            raise ConfigurationError("an endpoint file and --base-url or --model were given", "Give one or the other")
        given = read_toml(Endpoint, endpoint_file).model_dump(by_alias=True, exclude_none=True)
        where = str(endpoint_file)
    elif base_url is not None and model is not None:
        given = {"name": model, "base_url": base_url, "model": model}
        where = "the command line"
    else:
        raise ConfigurationError("no endpoint was named", "Give an ENDPOINT.toml, or --base-url and --model")
    options = {"reference": reference, "policy": policy, "api_key_env": api_key_env}
    given |= {name: value for name, value in options.items() if value is not None}
    limits = given.setdefault("limits", {})
    if max_requests is not None:
        limits["max_requests"] = max_requests
    if max_cost is not None:
        limits["max_cost_usd"] = max_cost
    return checked(Endpoint, given, where)


def reference_of(endpoint: Endpoint) -> Bundle | None:
    """Load the endpoint's reference bundle; None where none is named."""
    return load_bundle(endpoint.reference) if endpoint.reference is not None else None


def new_run_folder(endpoint: Endpoint) -> Path:
    """A folder of its own for each run, under reports/."""
    name = re.sub(r"[^a-z0-9]+", "-", endpoint.name.lower()).strip("-")[:50] or "endpoint"
    return Path("reports") / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[AuditProgress], None]]:
    """Show progress on stderr: a moving line in a terminal, a line now and then elsewhere."""

    def state(progress: AuditProgress) -> str:
        text = f"{progress.requests} of at most {progress.planned} requests"
        if progress.log10_e_value is not None and progress.noise_nats is not None:
            text += f", noise {progress.noise_nats:.3f} nats, evidence 10^{progress.log10_e_value:.1f}"
        return text

    if not sys.stderr.isatty():

        def tell(progress: AuditProgress) -> None:
            if progress.requests % LINES_EVERY_REQUESTS == 0:
                talk.print(f"{label}: {state(progress)}", markup=False, highlight=False)

        yield tell
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=talk, transient=True) as bar:
        task = bar.add_task(label, total=None, state="")
        yield lambda progress: bar.update(
            task, completed=progress.requests, total=progress.planned, state=state(progress)
        )


def collect_controls(folder: RunFolder, bundle: Bundle | None) -> None:
    """Collect what is still missing of a run's controls, which this user started.

    Raises
    ------
    RunFolderError
        If a control's plan is not this user's own: nothing of a stranger's file decides where a key goes.
    """
    for kind, control in controls_of(folder):
        plan = control.plan()
        if not control.is_own():
            raise RunFolderError(
                f"the {kind} control of {folder.path} was not started by you, or its plan was changed", "Audit again"
            )
        with progress_bar(f"{kind} control {plan.endpoint.name}") as onlooker:
            key = key_for(plan.endpoint.api_key_env, plan.endpoint.origin)
            collect_run(control, plan, plan.endpoint, bundle, key, onlooker)


def judge_and_report(folder: RunFolder, bundle: Bundle | None) -> tuple[Plan, Findings, Verdict]:
    """Judge a run folder and write all its reports."""
    plan, findings, verdict = judge_run(folder, bundle)
    report = make_report(folder.path, plan, findings, verdict)
    write_report_json(folder.path, report)
    write_junit(folder.path, report)
    write_html(folder.path, report)
    write_table(folder.path)
    return plan, findings, verdict


def show_run(folder: RunFolder, plan: Plan, findings: Findings, verdict: Verdict, as_json: bool) -> None:
    """Print a judged run: one JSON document, or a summary for people."""
    report = make_report(folder.path, plan, findings, verdict)
    if as_json:
        print_json({**report_json(report), "folder": str(folder.path)})
    else:
        print_summary(Console(), report, str(folder.path))


def print_json(document: dict[str, Any], *, ascii_only: bool = False) -> None:
    """Print one JSON document to stdout; `ascii_only` keeps a stranger's control characters escaped in a terminal."""
    click.echo(json.dumps(document, indent=1, ensure_ascii=ascii_only, sort_keys=True))
