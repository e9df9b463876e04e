"""weighbridge publish, and what else changes a site."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click
import filelock

from weighbridge.attest import public_key_in, public_key_of
from weighbridge.cli.common import json_option, print_json, talk
from weighbridge.cli.reference_licence import plain
from weighbridge.errors import ConfigurationError, EvidenceError
from weighbridge.history.index import opened, refresh, runs
from weighbridge.nightly.collection import NIGHT, Night
from weighbridge.publish.build import SIGNER, build_site
from weighbridge.publish.enter import NEEDED, Entered, Terms, commit_night, enter_runs
from weighbridge.publish.entries import DisclosedEntry
from weighbridge.publish.log import LOG, Appending, Log, read_log, write_head
from weighbridge.publish.site import Settings, SiteFile, load_site, read_site_file
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
@click.option(
    "--disclose",
    metavar="SHA256",
    help="Give up the sealed pool of this digest: reports that show its probes may be shown.",
)
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
    moment = now()
    with locked(site):
        described = read_site_file(site)
        before = read_log(site / LOG)
        same_signer(site, before, key_file)
        log = Appending(before)
        if disclose is not None:
            _disclose(log, disclose, moment)
        with opened(root, _say) as connection:
            refresh(connection, root, _say)
            whole = runs(connection, columns=NEEDED)
        try:
            entered = enter_runs(whole, root, site, log, Terms(moment, notice_days, key_file), _say)
        finally:
            entire = log.write(site / LOG)
            write_head(site, entire, key_file)
        written = build(site, entire, described, key_file, moment)
    _show_published(site, entered, written, entire, as_json)
    return 0


def enter_draws(site: Path, night: Path, key_file: Path | None) -> None:
    """Enter a night's draws into a site's log, before anything is asked."""
    with locked(site):
        before = read_log(site / LOG)
        same_signer(site, before, key_file)
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
                "held": [{"endpoint": h.endpoint, "until": h.until.isoformat() if h.until else None, "evidence": str(h.evidence)} for h in entered.held],
                "left_out": [{"endpoint": name, "why": why} for name, why in entered.left_out],
            },
            ascii_only=True,
        )  # fmt: skip
        return
    click.echo(
        f"{site}: {len(entered.reports)} reports entered, {written} files written, {len(log.entries)} lines in the log"
    )
    for held in entered.held:
        when = (
            f"until {held.until}: tell the host now, with"
            if held.until is not None
            else "until its sealed pool is disclosed;"
        )
        click.echo(plain(f"held back: {held.endpoint}, {when} {held.evidence}"))
    for name, why in entered.left_out:
        click.echo(plain(f"left out: {name}: {why}"))
    click.echo(f"open {site / 'index.html'}")


def _disclose(log: Appending, sha256: str, now: datetime) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ConfigurationError(
            f"--disclose {sha256!r} is no pool's digest", "Give the SHA-256 that plan.json and report.json name"
        )
    if all(e.sha256 != sha256 for e in log.entries if isinstance(e, DisclosedEntry)):
        log.add(DisclosedEntry, now, sha256=sha256)


def build(site: Path, log: Log, described: SiteFile, key_file: Path | None, moment: datetime) -> int:
    """Make the site's files as of a day; returns how many were written."""
    signer = public_key_of(key_file) if key_file is not None else None
    settings = Settings(described.title, described.base_url, described.contact, signer, moment.date())
    return build_site(site, load_site(site, log, settings))


def same_signer(site: Path, log: Log, key_file: Path | None) -> None:
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
def locked(site: Path) -> Iterator[None]:
    """One command at a time on a site; a disk that fails is one line."""
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


def now() -> datetime:
    """The time, or that of SOURCE_DATE_EPOCH, by which the same site can be made again to the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "").strip()
    if not epoch:
        return datetime.now(UTC).replace(microsecond=0)
    if not epoch.isdecimal() or len(epoch) > 11:
        raise ConfigurationError("SOURCE_DATE_EPOCH is no number of seconds", "Set it to one, or unset it")
    return datetime.fromtimestamp(int(epoch), UTC)


def _say(text: str) -> None:
    talk.print(text, markup=False, highlight=False, soft_wrap=True)
