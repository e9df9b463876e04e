"""report.json: everything a machine may want of one audit, with a published JSON Schema."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from weighbridge.canonical import canonical_bytes, file_sha256, rounded, write_atomically
from weighbridge.records import (
    BundleIdentity,
    Draw,
    Estimate,
    Findings,
    Plan,
    Policy,
    PoolIdentity,
    Price,
    Record,
    Verdict,
)

SCHEMA_FILE = Path(__file__).resolve().parent.parent / "schemas" / "report-1.json"


class AuditedEndpoint(Record):
    """What was audited, as far as a report shows it."""

    name: str
    base_url: str
    model: str
    dialect: str
    claimed_precision: str | None
    price: Price | None


class Report(Record):
    """One audit."""

    schema_: Literal["weighbridge/report/1"] = Field(default="weighbridge/report/1", alias="schema")
    weighbridge_version: str
    run_id: str
    created_at: str
    endpoint: AuditedEndpoint
    policy: Policy
    reference: BundleIdentity | None
    pool: PoolIdentity | None
    draw: Draw
    estimate: Estimate
    verdict: Verdict
    findings: Findings
    sha256: dict[str, str] = Field(description="of the run folder's files that this report rests on")

    model_config = Record.model_config | {"populate_by_name": True}


def make_report(folder: Path, plan: Plan, findings: Findings, verdict: Verdict) -> Report:
    """Put plan, findings and verdict together with the hashes of the files they come from."""
    names = ("plan.json", "exchanges.jsonl", "observations.jsonl", "findings.json", "verdict.json")
    return Report(
        weighbridge_version=verdict.weighbridge_version,
        run_id=plan.run_id,
        created_at=plan.created_at,
        endpoint=AuditedEndpoint(**plan.endpoint.model_dump(include=set(AuditedEndpoint.model_fields))),
        policy=plan.policy,
        reference=plan.reference,
        pool=plan.pool,
        draw=plan.draw,
        estimate=plan.estimate,
        verdict=verdict,
        findings=findings,
        sha256={name: file_sha256(folder / name) for name in names if (folder / name).exists()},
    )


def report_json(report: Report) -> dict[str, Any]:
    """The report as a JSON value, numbers to six significant digits."""
    value: dict[str, Any] = rounded(report.model_dump(mode="json", by_alias=True))
    return value


def write_report_json(folder: Path, report: Report) -> None:
    """Write report.json."""
    write_atomically(folder / "report.json", canonical_bytes(report_json(report)) + b"\n")


def report_schema() -> str:
    """The JSON Schema of report.json, as text; `python -m weighbridge.report.document` writes it into the package."""
    schema = Report.model_json_schema(by_alias=True, mode="serialization")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(report_schema(), "utf-8")
