"""The summary that a person reads in a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weighbridge.judge.checks import prose
from weighbridge.report.document import Report
from weighbridge.report.html import MARKS, WORDS


def _plain(text: str, style: str = "") -> Text:
    """Text without what would steer a terminal: a stranger's run folder or bundle may hold it."""
    return Text("".join(c if c.isprintable() else "\ufffd" for c in text), style)


def print_summary(console: Console, report: Report, folder: str) -> None:
    """Print verdict, findings, cost and where the report is."""
    verdict = report.verdict
    style = {"consistent": "bold green", "differs": "bold red", "differs_replicated": "bold red"}.get(
        verdict.verdict, "bold yellow"
    )
    console.print(
        _plain(f"{MARKS[verdict.verdict]} {WORDS[verdict.verdict]}", style).append_text(
            _plain(f"  {report.endpoint.name}")
        )
    )
    console.print(_plain(verdict.sentence))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("question", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("what was found")
    for finding in report.findings.findings:
        table.add_row(
            _plain(prose()[finding.check].title),
            _plain(f"{MARKS[finding.outcome]} {finding.outcome.replace('_', ' ')}"),
            _plain(finding.summary),
        )
    console.print(table)
    for finding in report.findings.findings:
        if finding.axis in report.policy.requires and finding.to_resolve and finding.outcome != "consistent":
            console.print(_plain(f"to resolve ({finding.axis}): {finding.to_resolve}"))
    cost = f", {verdict.cost_usd:.6f} USD" if verdict.cost_usd is not None else ""
    console.print(
        _plain(
            f"{verdict.requests_sent} requests, {verdict.prompt_tokens} prompt tokens{cost}; stopped: {verdict.stopped_because.replace('_', ' ')}",
            "dim",
        )
    )
    console.print(_plain(f"report: {folder}/report.html", "dim"), soft_wrap=True)
