"""weighbridge dispute."""

from pathlib import Path
from typing import get_args

import click
from pydantic import ValidationError

from weighbridge.cli.common import json_option, print_json
from weighbridge.cli.publish import build, key_option, locked, now, same_signer
from weighbridge.cli.reference_licence import plain
from weighbridge.errors import ConfigurationError
from weighbridge.publish.entries import ReportEntry, StatementEntry, StatementKind
from weighbridge.publish.log import LOG, Appending, Log, read_log, write_head
from weighbridge.publish.site import read_site_file


@click.command("dispute")
@click.argument("site", type=click.Path(path_type=Path))
@click.argument("report", metavar="REPORT")
@click.argument("what", metavar="WHAT", type=click.Choice(get_args(StatementKind)))
@click.option("--by", required=True, help="Who says so.")
@click.option("--text", "text_file", type=click.Path(path_type=Path), help="A file with the statement, as plain text.")
@click.option("--link", help="Where the statement is: an https address.")
@click.option("--answered-by", "answer", metavar="REPORT", help="The report of a re-run.")
@key_option
@json_option
def dispute_command(
    site: Path, report: str, what: StatementKind, by: str, text_file: Path | None, link: str | None, answer: str | None,
    key_file: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Enter a host's reply, the course of a dispute, or a correction, which then stands beside the verdict.

    REPORT is an endpoint's page name (its latest report), or the beginning of the evidence's digest. WHAT is dispute_opened, reply,
    re_run, resolved or correction.
    """
    if (text_file is None) == (link is None):
        raise ConfigurationError("a statement has either --text or --link", "Give one of them")
    if (what == "re_run") != (answer is not None):
        raise ConfigurationError("--answered-by and re_run belong together", "Name the report of the re-run")
    text = _text(text_file) if text_file is not None else None
    if not (site / LOG).exists():
        raise ConfigurationError(f"{site} holds no {LOG}", "Name a site that `weighbridge publish` has made")
    moment = now()
    with locked(site):
        described = read_site_file(site)
        before = read_log(site / LOG)
        same_signer(site, before, key_file)
        about = _report(before, report)
        other = _report(before, answer) if answer is not None else None
        if other is not None and (other.slug != about.slug or other.created_at <= about.created_at):
            raise ConfigurationError(
                f"{answer} is no later report of {about.endpoint}", "Name the report of the re-run"
            )
        log = Appending(before)
        fields = {"about": about.index, "what": what, "by": by, "text": text, "link": link}
        try:
            entry = log.add(StatementEntry, moment, **fields, report=other.index if other is not None else None)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = str(first["loc"][0]) if first["loc"] else "it"
            raise ConfigurationError(f"the statement's {where}: {first['msg']}", "Correct it and run again") from None
        entire = log.write(site / LOG)
        write_head(site, entire, key_file)
        build(site, entire, described, key_file, moment)
    if as_json:
        print_json({"schema": "weighbridge/entered/1", "entry": entry.model_dump(mode="json")}, ascii_only=True)
    else:
        click.echo(plain(f"entered as line {entry.index + 1}, about the report of {about.endpoint} of {about.night}"))
    return 0


def _report(log: Log, named: str) -> ReportEntry:
    """A report by its endpoint's page name (the latest), or by the beginning of its evidence's digest."""
    replaced = {r.supersedes for r in log.reports()}
    standing = [r for r in log.reports() if r.index not in replaced]
    of_slug = [r for r in standing if r.slug == named]
    if of_slug:
        return max(of_slug, key=lambda r: (r.created_at, r.index))
    found = [r for r in log.reports() if len(named) >= 8 and r.evidence_sha256.startswith(named)]
    if len(found) != 1:
        known = ", ".join(sorted({r.slug for r in standing})[:10]) or "none"
        raise ConfigurationError(
            f"no report is {named!r}", f"Name an endpoint ({known}) or 8 digits of an evidence's digest"
        )
    return found[0]


def _text(path: Path) -> str:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"{path} cannot be read as text", "Check the file; it is to be UTF-8") from None
    if not text:
        raise ConfigurationError(f"{path} holds no statement", "Write it down there")
    return text
