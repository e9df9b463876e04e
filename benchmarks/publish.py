"""A public site of a year: made in whole, brought up to date by one night, looked at in a browser, tampered with.

    python benchmarks/publish.py [--quick] [--seed 1] [--json]

Six endpoints of the lab are really audited once (`weighbridge demo`, kept under .benchmarks-cache/published/). A year of so many endpoints
is these six reports again under other names and nights, with noise drawn around what was measured: the site's speed is measured here and
nothing is said of any endpoint. Evidence lies there for the latest night of each endpoint; a whole year of it would be 20 GB. The
run folders of the year's other nights are stubs, which is what the history's index needs to see of them.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from browser import find_chromium, look, malformed
from figures import CACHE, Document, Figure, say
from weighbridge.attest import new_key, trusted_keys
from weighbridge.canonical import canonical_bytes, sha256_hex
from weighbridge.errors import EvidenceError
from weighbridge.fleet import slug_of
from weighbridge.history.index import opened, refresh, runs
from weighbridge.history.row import Row, make_row, write_row
from weighbridge.nightly.collection import Committed, Night
from weighbridge.nightly.judgement import FleetNight, FleetRow, write_night
from weighbridge.publish.enter import NEEDED, Terms, enter_runs
from weighbridge.publish.entries import CommitmentsEntry, ReportEntry
from weighbridge.publish.log import LOG, Appending, read_log, write_head
from weighbridge.publish.verify import verify_report, verify_site

CLI = [sys.executable, "-c", "from weighbridge.cli import main; main()"]
FIRST_NIGHT = date(2026, 1, 1)
EVIDENCE = "evidence.zip"


def audited() -> Path:
    """Six real audits, made once."""
    folder = CACHE / "published"
    if not list(folder.glob("*/verdict.json")):
        say("auditing six endpoints of the lab")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(
            [*CLI, "demo", "--seed", "published", "--out", str(folder)], check=True, stdout=subprocess.DEVNULL
        )
    return folder


class Year:
    """A fleet's year in a scratch folder: run folders, and the site with its log."""

    def __init__(self, scratch: Path, endpoints: int, nights: int, seed: int) -> None:
        self.runs, self.site, self.key = scratch / "runs", scratch / "site", scratch / "signer"
        self.endpoints, self.nights = endpoints, nights
        self.rng = np.random.default_rng(seed)
        new_key(self.key, "benchmark")
        self.sources = sorted(path.parent for path in audited().glob("*/verdict.json"))
        self.rows = {source: make_row(source) for source in self.sources}
        self.reports = self._real_reports(scratch / "real")

    def _real_reports(self, scratch: Path) -> dict[Path, tuple[ReportEntry, bytes, bytes]]:
        """Each real audit as it is entered: its entry, evidence and page."""
        shutil.copytree(audited(), scratch / "runs")
        log = Appending(read_log(scratch / "site" / LOG))
        with opened(scratch / "runs", say) as connection:
            refresh(connection, scratch / "runs", say)
            done = enter_runs(
                runs(connection, columns=NEEDED), scratch / "runs", scratch / "site", log, Terms(_noon(FIRST_NIGHT), 0, self.key), say
            )  # fmt: skip
        assert len(done.reports) == len(self.sources), done
        self.first_entries = [e for e in log.entries if not isinstance(e, ReportEntry | CommitmentsEntry)]
        shutil.copytree(scratch / "site" / "references", self.site / "references")
        by_name = {entry.endpoint: entry for entry in done.reports}
        out = {}
        for source in self.sources:
            entry = by_name[self.rows[source].endpoint]
            folder = scratch / "site" / entry.folder
            out[source] = (entry, (folder / EVIDENCE).read_bytes(), (folder / "report.html").read_bytes())
        return out

    def source(self, endpoint: int) -> Path:
        """What an endpoint is a copy of."""
        return self.sources[endpoint % len(self.sources)]

    def name(self, endpoint: int) -> str:
        """What it is called."""
        return f"Host {endpoint:03d}"

    def row(self, endpoint: int, night: date) -> Row:
        """One night of one endpoint, with noise of its own."""
        known = self.rows[self.source(endpoint)]
        factor = float(np.exp(self.rng.normal(0, 0.1)))
        run_id = sha256_hex(f"{endpoint} {night}".encode())
        noise = {
            n: None if getattr(known, n) is None else float(f"{getattr(known, n) * factor:.6g}")
            for n in ("noise_nats", "noise_low_nats", "noise_high_nats")
        }
        return known.model_copy(
            update={
                "endpoint": self.name(endpoint), "night": night, "created_at": _noon(night) + timedelta(hours=10), "run_id": run_id[:16],
                "commitment": run_id, **noise,
            }
        )  # fmt: skip

    def write_log(self) -> None:
        """The log of the whole year, and the evidence of its last night."""
        log = Appending(read_log(self.site / LOG))
        for entry in self.first_entries:
            log.add(type(entry), _noon(FIRST_NIGHT), **_fields(entry))
        for n in range(self.nights):
            night = FIRST_NIGHT + timedelta(days=n)
            rows = [self.row(e, night) for e in range(self.endpoints)]
            log.add(CommitmentsEntry, _noon(night), night=night, commitments=[r.commitment for r in rows])
            for e, row in enumerate(rows):
                real, evidence, page = self.reports[self.source(e)]
                is_last = n == self.nights - 1
                digest = real.evidence_sha256 if is_last else row.commitment
                said = row.model_dump(include=set(ReportEntry.model_fields))
                said |= {"slug": slug_of(row.endpoint), "evidence_sha256": digest, "judged_together": self.endpoints}
                report = log.add(ReportEntry, _noon(night) + timedelta(hours=20), **{**_fields(real), **said})
                if is_last:
                    folder = self.site / report.folder
                    folder.mkdir(parents=True)
                    (folder / EVIDENCE).write_bytes(evidence)
                    (folder / "report.html").write_bytes(page)
                stub = self.runs / night.isoformat() / slug_of(row.endpoint)
                stub.mkdir(parents=True)
                for name in ("plan.json", "verdict.json"):
                    (stub / name).write_bytes(b"{}")
                write_row(stub, row)
        log.write(self.site / LOG)
        write_head(self.site, read_log(self.site / LOG), self.key)
        with opened(self.runs, say) as connection:
            refresh(connection, self.runs, say)

    def next_night(self) -> None:
        """One more night of the whole fleet, collected and judged: real run folders under other names."""
        night = FIRST_NIGHT + timedelta(days=self.nights)
        folder = self.runs / night.isoformat()
        said, committed = [], []
        for e in range(self.endpoints):
            source, row = self.source(e), self.row(e, night)
            target = folder / slug_of(row.endpoint)
            target.mkdir(parents=True)
            for name in ("exchanges.jsonl", "observations.jsonl", "findings.json", "verdict.json", "report.html"):
                shutil.copy(source / name, target / name)
            plan = json.loads((source / "plan.json").read_bytes())
            plan["endpoint"]["name"], plan["run_id"], plan["created_at"] = (
                row.endpoint,
                row.run_id,
                row.created_at.isoformat(),
            )
            plan["draw"]["commitment"] = row.commitment
            (target / "plan.json").write_text(json.dumps(plan, indent=1, sort_keys=True), "utf-8")
            write_row(target, row)
            committed.append(
                Committed(endpoint=row.endpoint, folder=target.name, run_id=row.run_id, commitment=row.commitment)
            )
            said.append(
                FleetRow(
                    endpoint=row.endpoint, folder=target.name, state="done", why=None, verdict=row.verdict, cause=row.cause,
                    judged_together=self.endpoints, log10_e_value=row.log10_e_value, sentence="A night of the benchmark.",
                )
            )  # fmt: skip
        write_night(
            folder, FleetNight(fleet="benchmark", night=night.isoformat(), false_discovery_rate=0.01, endpoints=said)
        )
        known = Night(
            night=night.isoformat(), fleet="benchmark", weighbridge_version="0", began_at=_noon(night), committed=committed,
        )  # fmt: skip
        (folder / "night.json").write_bytes(canonical_bytes(known.model_dump(mode="json", by_alias=True)))

    def publish(self, site: Path, nights: int) -> float:
        """`weighbridge publish` as a process of its own, as if on the noon after so many nights; seconds."""
        epoch = int(_noon(FIRST_NIGHT + timedelta(days=nights)).timestamp())
        command = [
            *CLI,
            "publish",
            "--runs",
            str(self.runs),
            "--out",
            str(site),
            "--key",
            str(self.key),
            "--notice-days",
            "0",
            "--json",
        ]
        started = time.monotonic()
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
        )  # fmt: skip
        took = time.monotonic() - started
        said = json.loads(done.stdout)
        say(
            f"published: {len(said['reports'])} reports, {said['files_written']} files, {took:.1f} s; left out {said['left_out'][:2]}"
        )
        return took


def _noon(night: date) -> datetime:
    return datetime(night.year, night.month, night.day, 12, tzinfo=UTC)


def _fields(entry: Any) -> dict[str, Any]:
    return {k: v for k, v in entry.model_dump(by_alias=True).items() if k not in ("index", "previous", "at", "kind")}


def speed(document: Document, year: Year) -> None:
    """The whole site, twice, and one night more."""
    second = year.site.with_name("second")
    year.write_log()
    shutil.copytree(year.site, second)
    whole_s = year.publish(year.site, year.nights)
    document.figures["site of a year made in whole"] = Figure(
        round(whole_s, 1), f"s for {year.endpoints} endpoints x {year.nights} nights", "< 60", whole_s < 60
    )
    year.publish(second, year.nights)
    other = _others(year.site, second)
    document.figures["files that differ between two builds"] = Figure(other, "files", "0", other == 0)
    again_s = year.publish(year.site, year.nights)
    document.reported["nothing is new"] = f"{again_s:.1f} s"
    year.next_night()
    night_s = year.publish(year.site, year.nights + 1)
    document.figures["brought up to date by one night"] = Figure(
        round(night_s, 1), f"s for {year.endpoints} new reports, sealed and signed", "< 5", night_s < 5
    )
    document.reported["log"] = f"{(year.site / LOG).stat().st_size / 2**20:.0f} MB"
    document.reported["pages and documents"] = (
        f"{sum(p.stat().st_size for p in year.site.rglob('*') if p.is_file() and 'reports' not in p.parts) / 2**20:.0f} MB"
    )


def _others(one: Path, two: Path) -> int:
    files = [{p.relative_to(root) for p in root.rglob("*") if p.is_file()} for root in (one, two)]
    _, wrong, errors = filecmp.cmpfiles(one, two, [str(p) for p in files[0] & files[1]], shallow=False)
    return len(files[0] ^ files[1]) + len(wrong) + len(errors)


def real_site(scratch: Path, key: Path) -> Path:
    """The six real audits as a site."""
    runs_of = scratch / "six"
    shutil.copytree(audited(), runs_of)
    site = scratch / "six-site"
    command = [*CLI, "publish", "--runs", str(runs_of), "--out", str(site), "--key", str(key), "--notice-days", "0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return site


def tampering(document: Document, site: Path, key: Path) -> None:
    """Every kind of file changed by one byte, in turn: what `verify` says, and of what."""
    trusted = trusted_keys([Path(f"{key}.pub")])
    report = min(site.glob("reports/*/*"))
    whole = verify_report(report, None, None, trusted)
    again = whole.judged_again == "same" and whole.exit_code == 0
    document.figures["reports judged again to the same bytes"] = Figure(
        sum(verify_report(r, None, None, trusted).judged_again == "same" for r in sorted(site.glob("reports/*/*"))), "of 6", "6", again
    )  # fmt: skip
    files = {
        EVIDENCE: report / EVIDENCE, "report.html": report / "report.html", LOG: site / LOG, "log.head.json": site / "log.head.json",
        "references": next(site.glob("references/*.json")),
    }  # fmt: skip
    caught: dict[str, str] = {}
    for name, path in files.items():
        data = path.read_bytes()
        for place in (len(data) // 3, len(data) // 2, 2 * len(data) // 3):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            try:
                found = verify_site(site, trusted)
                said = " ".join(found.problems)
            except EvidenceError as error:
                said = str(error)
            if path.name in said:
                caught[f"{name} at {place}"] = said.replace(str(site), "")[:160]
        path.write_bytes(data)
    document.figures["changed bytes that are caught and named"] = Figure(
        len(caught), f"of {3 * len(files)}", "all", len(caught) == 3 * len(files)
    )
    document.reported["said of changed bytes"] = caught
    document.reported["a stranger's key"] = verify_report(report, None, None, []).evidence.signature.state


def looked_at(document: Document, site: Path, name: str) -> None:
    """The pages in a real browser, at two widths and in both themes."""
    chromium = find_chromium()
    pages = sorted(str(p.relative_to(site)) for p in site.rglob("index.html"))[:40]
    wrong = {page: found for page in pages if (found := malformed((site / page).read_text("utf-8")))}
    document.figures[f"{name}: pages that are not well-formed"] = Figure(len(wrong), f"of {len(pages)}", "0", not wrong)
    if chromium is None:
        document.reported[f"{name}: browser"] = "no chromium was found: pages were not looked at"
        return
    seen = look(chromium, site, pages)
    counted = {
        "console errors": sum(len(s.console) for s in seen),
        "pages with horizontal scroll": sum(s.overflow_px > 0 for s in seen),
        "texts of too little contrast": sum(len(s.contrast) for s in seen),
        "charts without a table": sum(len(s.charts_without_table) for s in seen),
    }
    for what, count in counted.items():
        document.figures[f"{name}: {what}"] = Figure(
            count, f"in {len(pages)} pages, 2 widths, 2 themes", "0", count == 0
        )


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the fleet, two months")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    endpoints, nights = (40, 60) if arguments.quick else (200, 365)
    document = Document("publish")
    with tempfile.TemporaryDirectory() as scratch:
        year = Year(Path(scratch), endpoints, nights, arguments.seed)
        site = real_site(Path(scratch), year.key)
        looked_at(document, site, "six real reports")
        tampering(document, site, year.key)
        speed(document, year)
        looked_at(document, year.site, "a year")
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
