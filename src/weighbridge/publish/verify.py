"""What a stranger does with a published report: hold it against its signature and its log, and judge it again, offline."""

import tempfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from weighbridge import __version__
from weighbridge.attest import SignatureState, TrustedKey, public_key_in
from weighbridge.audit import bundle_of, judge_run
from weighbridge.canonical import rounded, sha256_hex
from weighbridge.errors import BundleError, EvidenceError, WeighbridgeError
from weighbridge.fleet import night_of
from weighbridge.publish.build import SIGNER, files_of
from weighbridge.publish.documents import SiteIndex
from weighbridge.publish.enter import EVIDENCE, REPORT
from weighbridge.publish.entries import ReferenceEntry, ReportEntry, StatementEntry
from weighbridge.publish.evidence import CONTROLS, JUDGED_TO, MANIFEST, MOST_BYTES, Evidence, read_evidence
from weighbridge.publish.log import HEAD, LOG, Log, first_lines, read_log, verify_head
from weighbridge.publish.site import Settings, load_site, read_site_file
from weighbridge.records import Plan, Verdict
from weighbridge.reference.bundle import EMBEDDED, Bundle
from weighbridge.store import RunFolder

Judged = Literal["same", "other", "not_judged"]


@dataclass(frozen=True)
class Verified:
    """What is known of one report.

    ``judged_again`` is ``same`` where findings and verdict came out to the same bytes; ``why`` says what kept that from being tried, or
    which file came out otherwise. ``entry`` and ``log_signature`` are None where no log was at hand.
    """

    evidence: Evidence
    verdict: Verdict
    plan: Plan
    judged_again: Judged
    why: str | None
    entry: ReportEntry | None = None
    superseded_by: int | None = None
    statements: tuple[StatementEntry, ...] = ()
    log_signature: SignatureState | None = None

    @property
    def exit_code(self) -> int:
        """0: whole, by a trusted signer, judged the same; 1: judged otherwise; 3: something could not be verified."""
        if self.judged_again == "other":
            return 1
        whole = self.judged_again == "same" and self.evidence.signature.state == "trusted"
        return 0 if whole and (self.log_signature is None or self.log_signature.state == "trusted") else 3


@dataclass
class VerifiedSite:
    """What is known of a whole site: its log, and which of its reports, references and pages are as the log says.

    ``pages`` is how many were made again and compared; None where ``why`` kept that from being done.
    """

    log: Log
    signature: SignatureState
    reports: int = 0
    pages: int | None = None
    why: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: whole and signed by a trusted key; 2: something is not as the log says; 3: whole, by someone unknown."""
        if self.problems:
            return 2
        return 0 if self.signature.state == "trusted" and self.pages is not None else 3


def verify_report(path: Path, reference: str | None, log_file: Path | None, trusted: list[TrustedKey]) -> Verified:
    """Verify one report: an evidence.zip, or the folder that holds it.

    Parameters
    ----------
    path : pathlib.Path
    reference : str, optional
        The reference bundle's folder or name; by default the embedded one that the report names.
    log_file : pathlib.Path, optional
        The log that is to know the report; by default the one of the site that the report lies in.
    trusted : list of TrustedKey

    Raises
    ------
    EvidenceError
        Naming what was changed, is missing or does not fit: a file of the evidence, the signature, the page, the log.
    """
    archive = path / EVIDENCE if path.is_dir() else path
    evidence = read_evidence(_bytes(archive), str(archive), trusted)
    plan, verdict = _record(evidence, archive)
    page = archive.with_name(REPORT)
    if archive.name == EVIDENCE and page.exists() and _bytes(page) != evidence.files.get(REPORT):
        raise EvidenceError(f"{page} is not the page that was sealed", "Believe the evidence; fetch the page again")
    judged, why = _judge_again(evidence, plan, reference)
    log_file = log_file or log_above(archive)
    if log_file is None:
        return Verified(evidence, verdict, plan, judged, why)
    log = _whole_log(log_file)
    signature = (
        verify_head(log_file.parent, log, trusted) if (log_file.parent / HEAD).exists() else SignatureState("unsigned")
    )
    entry = next((r for r in log.reports() if r.evidence_sha256 == evidence.sha256), None)
    if entry is None:
        raise EvidenceError(
            f"{archive} is not in {log_file}: no report there has its digest {evidence.sha256[:16]}…",
            "It was changed after it was entered, or is of another site",
        )
    _same(entry, plan, verdict, archive)
    after = next((r.index for r in log.reports() if r.supersedes == entry.index), None)
    told = tuple(s for s in log.statements() if s.about == entry.index)
    return Verified(evidence, verdict, plan, judged, why, entry, after, told, signature)


def verify_site(root: Path, trusted: list[TrustedKey]) -> VerifiedSite:
    """Hold everything that a site shows against its log; nothing is judged again.

    Raises
    ------
    EvidenceError
        If the log itself was changed, or its head is not of it.
    """
    log = _whole_log(root / LOG)
    found = VerifiedSite(log, verify_head(root, log, trusted))
    for entry in log.entries:
        try:
            if isinstance(entry, ReportEntry):
                found.reports += 1
                _verify_entry(root, entry, trusted)
            elif isinstance(entry, ReferenceEntry):
                path = root / "references" / f"{entry.digest}.json"
                if sha256_hex(_bytes(path)) != entry.digest:
                    raise EvidenceError(f"{path} is not the reference that the log names", "Fetch it again")
        except EvidenceError as error:
            found.problems.append(str(error))
    if not found.problems:
        _verify_pages(root, found)
    return found


def _verify_pages(root: Path, found: VerifiedSite) -> None:
    """Make every page again, as of the day on which it was made, and hold it against the one that is there."""
    if not found.reports and not (root / "index.json").exists():
        found.pages = 0  # draws were entered, and nothing is said yet
        return
    try:
        index = SiteIndex.model_validate_json(_bytes(root / "index.json"))
    except ValidationError:
        found.problems.append(f"{root / 'index.json'} is not as `publish` writes it. Fetch it again")
        return
    signer = public_key_in(root / SIGNER)
    if index.weighbridge_version != __version__:
        found.why = f"pages were made by version {index.weighbridge_version}; this is {__version__}, and makes others"
        return
    lines = index.log.entries
    if lines > len(found.log.entries):
        found.problems.append(
            f"{root / LOG} lacks lines that the pages were made from: the pages know {lines}. Fetch it again"
        )
        return
    if lines < len(found.log.entries):
        found.why = f"pages are of the log's first {lines} lines; the next `publish` brings them up to date"
    signers = {key.raw for key in found.signature.signers}
    if signers and (signer is None or signer.raw not in signers):
        found.problems.append(f"{root / SIGNER} is not the key that signed the log. Fetch it again")
    described = read_site_file(root)
    settings = Settings(described.title, described.base_url, described.contact, signer, index.made_on)
    files = files_of(load_site(root, first_lines(root / LOG, found.log, lines), settings))
    for name, data in sorted(files.items()):
        path = root / name
        if not path.exists() or _bytes(path) != data:
            found.problems.append(f"{path} is not what the log and the evidence say. Fetch it again")
    found.pages = len(files)


def _verify_entry(root: Path, entry: ReportEntry, trusted: list[TrustedKey]) -> None:
    archive = root / entry.folder / EVIDENCE
    data = _bytes(archive)
    if sha256_hex(data) != entry.evidence_sha256:
        raise EvidenceError(f"{archive} is not what the log says; it was changed", "Fetch it again")
    evidence = read_evidence(data, str(archive), trusted)
    page = archive.with_name(REPORT)
    if _bytes(page) != evidence.files.get(REPORT):
        raise EvidenceError(f"{page} is not the page that was sealed", "Fetch it again")
    _same(entry, *_record(evidence, archive), archive)


def _whole_log(path: Path) -> Log:
    """A log as a reader gets it: what follows its last whole line was never entered."""
    log = read_log(path)
    if path.exists() and path.stat().st_size != log.size:
        raise EvidenceError(f"{path} does not end with a whole line", "Fetch it again")
    return log


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise EvidenceError(f"{path} is larger than evidence can be", "Do not use it")
        return path.read_bytes()
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read ({error.strerror})", "Check the path") from None


def _record(evidence: Evidence, archive: Path) -> tuple[Plan, Verdict]:
    """Plan and verdict, which say of each other and of the reference what they should."""
    try:
        plan = Plan.model_validate_json(evidence.files["plan.json"])
        verdict = Verdict.model_validate_json(evidence.files["verdict.json"])
    except ValidationError:
        raise EvidenceError(
            f"{archive}: its plan or verdict is of another version of Weighbridge, or none",
            f"This is version {__version__}; verify with the one that made it",
        ) from None
    if verdict.observations_sha256 != sha256_hex(evidence.files["observations.jsonl"]):
        raise EvidenceError(f"{archive}: the verdict is of other observations", "Do not use it")
    manifest = evidence.files.get(MANIFEST)
    if (manifest is None) != (plan.reference is None):
        raise EvidenceError(
            f"{archive}: {MANIFEST} and the plan do not agree on whether there is a reference", "Do not use it"
        )
    if plan.reference is not None and manifest is not None and sha256_hex(manifest) != plan.reference.digest:
        raise EvidenceError(f"{archive}: {MANIFEST} is not the reference that the plan names", "Do not use it")
    return plan, verdict


def _same(entry: ReportEntry, plan: Plan, verdict: Verdict, archive: Path) -> None:
    """Whether the log says of a report what its evidence does."""
    said = (entry.run_id, entry.endpoint, entry.model, entry.base_url, entry.alone, entry.policy, entry.commitment)
    is_so = (
        plan.run_id, plan.endpoint.name, plan.endpoint.model, plan.endpoint.base_url, verdict.verdict, plan.policy.id, plan.draw.commitment,
    )  # fmt: skip
    noise = verdict.effective_noise_nats
    more_said = (
        entry.claimed_precision, entry.created_at.isoformat(), entry.night, entry.weighbridge_version, entry.policy_version, entry.reference,
        entry.pool, entry.log10_e_value, entry.noise_nats, entry.noise_low_nats, entry.noise_high_nats, entry.answers_used,
        entry.requests_sent, entry.prompt_tokens, entry.completion_tokens, entry.cost_usd, entry.stopped_because,
    )  # fmt: skip
    created_at = _time(plan.created_at)
    more_is_so = (
        plan.endpoint.claimed_precision, created_at.isoformat() if created_at is not None else "", night_of(created_at) if created_at is not None else None,
        verdict.weighbridge_version, plan.policy.version, plan.reference.digest if plan.reference is not None else None,
        plan.pool.sha256 if plan.pool is not None else None, verdict.log10_e_value, noise.value if noise else None, noise.low if noise else None,
        noise.high if noise else None, verdict.answers_used, verdict.requests_sent, verdict.prompt_tokens, verdict.completion_tokens,
        verdict.cost_usd, verdict.stopped_because,
    )  # fmt: skip
    # What a fleet's night says of an endpoint is said by the log alone.
    alone = entry.judged_together is not None or (entry.verdict, entry.cause, entry.sentence) == (
        verdict.verdict, verdict.cause, verdict.sentence,
    )  # fmt: skip
    variant = verdict.exact_variant if entry.verdict.startswith("differs") else None
    as_it_is = (
        said == is_so and rounded([*more_said[3:]]) == rounded([*more_is_so[3:]]) and more_said[:3] == more_is_so[:3]
    )
    if not as_it_is or not alone or entry.axes != verdict.axes or entry.exact_variant != variant:
        raise EvidenceError(f"{archive}: line {entry.index + 1} of the log says something else of it", "Do not use it")


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _judge_again(evidence: Evidence, plan: Plan, reference: str | None) -> tuple[Judged, str | None]:
    with tempfile.TemporaryDirectory(prefix="weighbridge-") as scratch:
        folder = Path(scratch) / "run"
        for name, data in evidence.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        try:
            bundle = _reference(plan, reference)
        except BundleError as error:
            return "not_judged", f"the reference is not at hand: {error}"
        try:
            judge_run(RunFolder(folder), bundle)
        except WeighbridgeError as error:
            # Names of a stranger's fields may stand in it.
            what = "".join(c if c.isprintable() else "?" for c in error.what)
            raise EvidenceError(f"the evidence cannot be judged: {what}", "Do not use it") from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # What no collector writes, nothing that judges is prepared for.
            raise EvidenceError(f"the evidence cannot be judged ({type(error).__name__})", "Do not use it") from None
        names = [f"{place}{name}" for place in ("", *(f"{c}/" for c in CONTROLS)) for name in JUDGED_TO]
        others = [n for n in names if n in evidence.files and (folder / n).read_bytes() != evidence.files[n]]
    if not others:
        return "same", None
    made_by = Verdict.model_validate_json(evidence.files["verdict.json"]).weighbridge_version
    if made_by != __version__:
        why = f"judged by version {made_by}; this is {__version__}, whose judgement may be another: use that version"
        return "not_judged", why
    return "other", f"judged again, {', '.join(others)} came out otherwise"


def _reference(plan: Plan, given: str | None) -> Bundle | None:
    """The bundle that the user named, or the embedded one: a stranger's plan opens no file of this machine."""
    if plan.reference is not None and given is None and plan.reference.id not in EMBEDDED:
        raise BundleError(f"{plan.reference.id} ({plan.reference.digest[:12]}…)", "Name its folder with --reference")
    return bundle_of(plan.model_copy(update={"reference_path": None}), given)


def log_above(archive: Path) -> Path | None:
    """The log of the site in which a report lies: reports/ENDPOINT/NIGHT/evidence.zip."""
    parents = archive.resolve().parents
    found = parents[3] / LOG if len(parents) > 3 else None
    return found if found is not None and found.exists() else None
