"""weighbridge verify."""

from pathlib import Path
from typing import Any

import click

from weighbridge.attest import SignatureState, trusted_keys
from weighbridge.cli.common import json_option, print_json
from weighbridge.cli.reference_licence import plain
from weighbridge.cli.reference_sign import trusted_key_option
from weighbridge.errors import ConfigurationError
from weighbridge.publish.enter import EVIDENCE
from weighbridge.publish.log import LOG
from weighbridge.publish.verify import Verified, VerifiedSite, log_above, verify_report, verify_site


@click.command("verify")
@click.argument("report", metavar="REPORT", type=click.Path(path_type=Path))
@click.option("--reference", help="The reference bundle's folder, where it is not an embedded one.")
@click.option(
    "--log", "log_file", type=click.Path(path_type=Path),
    help="The log that is to know the report. Default: that of the site in which the report lies.",
)  # fmt: skip
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
