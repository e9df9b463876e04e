"""weighbridge publish, verify and dispute."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import click
import filelock
from pydantic import ValidationError

from weighbridge.attest import SignatureState, public_key_in, public_key_of, trusted_keys
from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.cli.reference_licence import plain
from weighbridge.cli.reference_sign import trusted_key_option
from weighbridge.errors import ConfigurationError, EvidenceError
from weighbridge.history.index import opened, refresh, runs
from weighbridge.nightly.collection import NIGHT, Night
from weighbridge.publish.build import SIGNER, build_site
from weighbridge.publish.enter import EVIDENCE, NEEDED, Entered, Terms, commit_night, enter_runs
from weighbridge.publish.entries import DisclosedEntry, ReportEntry, StatementEntry, StatementKind
from weighbridge.publish.log import LOG, Appending, Log, read_log, write_head
from weighbridge.publish.site import Settings, SiteFile, load_site, read_site_file
from weighbridge.publish.verify import Verified, VerifiedSite, log_above, verify_report, verify_site
from weighbridge.records import read_json

LOCK = "publish.lock"
NOTICE_DAYS = 14
key_option = click.option(
    "--key", "key_file", type=click.Path(path_type=Path),
    help="The private key that signs, as `reference keygen` makes it. Without one the site says that it is unsigned.",
)  # fmt: skip
site_option = click.option(
    "--out", "site", required=True, type=click.Path(path_type=Path), help="The folder of the site."
)
verify_log_option = click.option(
    "--log", "log_file", type=click.Path(path_type=Path),
    help="The log that is to know the report. Default: that of the site in which the report lies.",
)  # fmt: skip


@click.command("publish")
@site_option
@click.option(
    "--runs", "root", type=click.Path(path_type=Path), default=Path("reports"), show_default=True,
    help="The folder under which run folders lie.",
)  # fmt: skip
@key_option
@click.option(
    "--notice-days", type=click.IntRange(0, 365), default=NOTICE_DAYS, show_default=True,
    help="How long anything that differs is held back, so that its host can be told first.",
)  # fmt: skip
@click.option("--disclose", metavar="POOL", help="Give up this sealed pool: reports that show its probes may be shown.")
@json_option
def publish_command(
    site: Path, root: Path, key_file: Path | None, notice_days: int, disclose: str | None, as_json: bool
) -> int:
    """Make, or bring up to date, a public site of trust reports: pages, evidence and an append-only log.

    Every judged run that is not in the log is sealed and entered, once; pages are made from the log and the evidence alone. Nothing that
    was entered is ever changed: a run that was judged again supersedes its report.
    """
    if not root.is_dir():
        raise ConfigurationError(f"there is no folder {root}", "Name the folder of your runs with --runs")
    now = _now()
    with _locked(site):
        described = read_site_file(site)
        before = read_log(site / LOG)
        _same_signer(site, before, key_file)
        log = Appending(before)
        if disclose is not None:
            _disclose(log, disclose, now)
        with opened(root, _say) as connection:
            refresh(connection, root, _say)
            whole = runs(connection, columns=NEEDED)
        try:
            entered = enter_runs(whole, root, site, log, Terms(now, notice_days, key_file), _say)
        finally:
            entire = log.write(site / LOG)
            write_head(site, entire, key_file)
        written = _build(site, entire, described, key_file, now)
    _show_published(site, entered, written, entire, as_json)
    return 0


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
    now = _now()
    with _locked(site):
        described = read_site_file(site)
        before = read_log(site / LOG)
        _same_signer(site, before, key_file)
        about = _report(before, report)
        other = _report(before, answer) if answer is not None else None
        if other is not None and (other.slug != about.slug or other.created_at <= about.created_at):
            raise ConfigurationError(
                f"{answer} is no later report of {about.endpoint}", "Name the report of the re-run"
            )
        log = Appending(before)
        fields = {"about": about.index, "what": what, "by": by, "text": text, "link": link}
        try:
            entry = log.add(StatementEntry, now, **fields, report=other.index if other is not None else None)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = str(first["loc"][0]) if first["loc"] else "it"
            raise ConfigurationError(f"the statement's {where}: {first['msg']}", "Correct it and run again") from None
        entire = log.write(site / LOG)
        write_head(site, entire, key_file)
        _build(site, entire, described, key_file, now)
    if as_json:
        print_json({"schema": "weighbridge/entered/1", "entry": entry.model_dump(mode="json")}, ascii_only=True)
    else:
        click.echo(plain(f"entered as line {entry.index + 1}, about the report of {about.endpoint} of {about.night}"))
    return 0


@click.command("verify")
@click.argument("report", metavar="REPORT", type=click.Path(path_type=Path))
@click.option("--reference", help="The reference bundle's folder, where it is not an embedded one.")
@verify_log_option
@trusted_key_option
@json_option
def verify_command(
    report: Path, reference: str | None, log_file: Path | None, trusted_key_files: tuple[Path, ...], as_json: bool
) -> int:
    """Check a published report: signature, digests, log; and judge it again, offline. Nothing is fetched.

    REPORT is an evidence.zip, the folder that holds it, or a whole site, of which everything is held against its log.
    Exit codes: 0 whole, trusted, judged the same; 1 judged otherwise; 2 changed, or bad input; 3 unsigned, signed by someone unknown,
    or not judged again.
    """
    if not report.exists():
        raise ConfigurationError(f"there is no {report}", "Name an evidence.zip, its folder, or a site")
    for file in trusted_key_files:
        inside = report if report.is_dir() else report.parent
        log = log_file or log_above(report / EVIDENCE if report.is_dir() else report)
        if any(
            file.resolve().is_relative_to(p.resolve()) for p in (inside, *([log.parent] if log is not None else []))
        ):
            raise ConfigurationError(f"{file} stands beside what it is to vouch for", "Get the key elsewhere")
    trusted = trusted_keys(trusted_key_files)
    if (report / LOG).exists():
        found = verify_site(report, trusted)
        _show_site(found, as_json)
        return found.exit_code
    verified = verify_report(report, reference, log_file, trusted)
    _show_verified(verified, as_json)
    return verified.exit_code


def enter_draws(site: Path, night: Path, key_file: Path | None) -> None:
    """Enter a night's draws into a site's log, before anything is asked."""
    with _locked(site):
        before = read_log(site / LOG)
        _same_signer(site, before, key_file)
        log = Appending(before)
        commit_night(log, read_json(Night, night / NIGHT), datetime.now(UTC).replace(microsecond=0))
        write_head(site, log.write(site / LOG), key_file)
        if key_file is not None:
            (site / SIGNER).write_text(public_key_of(key_file).line, "utf-8")


def _show_published(site: Path, entered: Entered, written: int, log: Log, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "schema": "weighbridge/published/1", "site": str(site), "entries": len(log.entries), "head": log.head, "files_written": written,
                "reports": [{"endpoint": r.endpoint, "night": r.night.isoformat(), "verdict": r.verdict, "folder": r.folder} for r in entered.reports],
                "held": [{"endpoint": name, "until": until.isoformat() if until else None} for name, until in entered.held],
                "left_out": [{"endpoint": name, "why": why} for name, why in entered.left_out],
            },
            ascii_only=True,
        )  # fmt: skip
        return
    click.echo(
        f"{site}: {len(entered.reports)} reports entered, {written} files written, {len(log.entries)} lines in the log"
    )
    for name, until in entered.held:
        when = f"until {until}: tell the host now" if until is not None else "until its sealed pool is disclosed"
        click.echo(plain(f"held back: {name}, {when}"))
    for name, why in entered.left_out:
        click.echo(plain(f"left out: {name}: {why}"))
    click.echo(f"open {site / 'index.html'}")


def _show_site(found: VerifiedSite, as_json: bool) -> None:
    whole = not found.problems
    if as_json:
        print_json(
            {
                "schema": "weighbridge/site-verified/1", "whole": whole, "reports": found.reports, "pages": found.pages, "why": found.why, "entries": len(found.log.entries),
                "head": found.log.head, "signature": _signature(found.signature), "problems": found.problems,
            },
            ascii_only=True,
        )  # fmt: skip
        return
    for problem in found.problems:
        click.echo(plain(problem))
    state = "as the log says" if whole else f"{len(found.problems)} not as the log says"
    pages = f"{found.pages} pages and documents" if found.pages is not None else "pages not compared"
    click.echo(
        plain(f"{len(found.log.entries)} lines, {found.reports} reports, {pages}: {state}; {_signed(found.signature)}")
    )
    if found.why is not None:
        click.echo(plain(found.why))


def _show_verified(found: Verified, as_json: bool) -> None:
    entry = found.entry
    if as_json:
        print_json(
            {
                "schema": "weighbridge/verified/1", "endpoint": found.plan.endpoint.name, "model": found.plan.endpoint.model,
                "verdict": found.verdict.verdict, "cause": found.verdict.cause, "sentence": found.verdict.sentence,
                "evidence_sha256": found.evidence.sha256, "signature": _signature(found.evidence.signature),
                "judged_again": found.judged_again, "why": found.why, "log_index": entry.index if entry else None,
                "log_signature": _signature(found.log_signature) if found.log_signature else None,
                "public_verdict": entry.verdict if entry else None, "superseded_by": found.superseded_by,
                "statements": [s.model_dump(mode="json") for s in found.statements],
                "redactions": found.evidence.statement.predicate.get("redactions", []),
            },
            ascii_only=True,
        )  # fmt: skip
        return
    lines = [f"{found.plan.endpoint.name}: {found.verdict.verdict.replace('_', ' ')}. {found.verdict.sentence}"]
    lines.append(f"every file is as it was sealed; {_signed(found.evidence.signature)}")
    lines.append({"same": "judged again, offline: findings and verdict to the same bytes"}.get(found.judged_again, f"not the same: {found.why}" if found.judged_again == "other" else f"not judged again: {found.why}"))  # fmt: skip
    if entry is not None and found.log_signature is not None:
        lines.append(f"line {entry.index + 1} of the log; the log is {_signed(found.log_signature)}")
        if entry.verdict != found.verdict.verdict:
            lines.append(f"in public: {entry.verdict.replace('_', ' ')}. {entry.sentence}")
    if found.superseded_by is not None:
        lines.append(f"superseded by line {found.superseded_by + 1} of the log")
    lines += [f"{s.what.replace('_', ' ')} by {s.by}: {s.text or s.link}" for s in found.statements]
    for line in lines:
        click.echo(plain(line))


def _signed(state: SignatureState) -> str:
    if state.state == "trusted":
        return "signed by " + ", ".join(key.name for key in state.signers)
    if state.state == "unsigned":
        return "unsigned"
    names = ", ".join(keyid or "no key id" for keyid in state.keyids)
    return f"signed by someone unknown ({names}); name a key that you trust with --trusted-key"


def _signature(state: SignatureState) -> dict[str, Any]:
    return {"state": state.state, "signers": [key.name for key in state.signers], "keyids": list(state.keyids)}


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


def _disclose(log: Appending, pool: str, now: datetime) -> None:
    known = {e.pool for e in log.entries if isinstance(e, DisclosedEntry)}
    if pool in known:
        return
    digest = re.fullmatch(r"[0-9a-f]{64}", pool)
    if digest is None:
        raise ConfigurationError(
            f"--disclose {pool!r} is no pool's digest", "Give the SHA-256 that `plan` and report.json name"
        )
    log.add(DisclosedEntry, now, pool=pool, sha256=pool)


def _build(site: Path, log: Log, described: SiteFile, key_file: Path | None, now: datetime) -> int:
    signer = public_key_of(key_file) if key_file is not None else None
    settings = Settings(described.title, described.base_url, described.contact, signer, now.date())
    return build_site(site, load_site(site, log, settings))


def _same_signer(site: Path, log: Log, key_file: Path | None) -> None:
    """A site that was signed goes on being signed by the same key; another one would say so to every reader."""
    path = site / SIGNER
    if not path.exists() or not log.entries:
        return
    known = public_key_in(path)
    if key_file is None or known is None or public_key_of(key_file).raw != known.raw:
        raise ConfigurationError(
            f"{site} is signed by the key in {path}",
            "Give that key with --key; to change it, move signer.pub elsewhere first",
        )


@contextmanager
def _locked(site: Path) -> Iterator[None]:
    lock = filelock.FileLock(site.parent / f".{site.name}.{LOCK}", timeout=0)
    try:
        site.mkdir(parents=True, exist_ok=True)
        with lock:
            yield
    except filelock.Timeout:
        raise EvidenceError(f"another command is at work on {site}", "Wait for it to end") from None
    except OSError as error:
        raise EvidenceError(
            f"{site} cannot be written ({error.strerror or error})",
            "Check the folder and the disk; what was entered is kept",
        ) from None


def _text(path: Path) -> str:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"{path} cannot be read as text", "Check the file; it is to be UTF-8") from None
    if not text:
        raise ConfigurationError(f"{path} holds no statement", "Write it down there")
    return text


def _now() -> datetime:
    """The time, or that of SOURCE_DATE_EPOCH, by which the same site can be made again to the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "").strip()
    if not epoch:
        return datetime.now(UTC).replace(microsecond=0)
    if not epoch.isdecimal() or len(epoch) > 11:
        raise ConfigurationError("SOURCE_DATE_EPOCH is no number of seconds", "Set it to one, or unset it")
    return datetime.fromtimestamp(int(epoch), UTC)


def _say(text: str) -> None:
    talk.print(text, markup=False, highlight=False, soft_wrap=True)
