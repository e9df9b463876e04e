"""report.html: one self-contained page without JavaScript."""

import math
from pathlib import Path

import jinja2

from weighbridge.canonical import write_atomically
from weighbridge.judge.checks import prose
from weighbridge.paths import data_path
from weighbridge.report.document import Report
from weighbridge.report.plots import course_plot, direction_plot, scale_plot, text_course_plot, text_departures_plot

MARKS = {
    "consistent": "✓", "inconsistent": "≠", "inconclusive": "?", "not_supported": "–", "not_applicable": "–", "error": "!",
    "differs": "≠", "differs_replicated": "≠",
}  # fmt: skip
WORDS = {
    "consistent": "Consistent", "differs": "Differs", "differs_replicated": "Differs, replicated", "inconclusive": "Not verified",
}  # fmt: skip


def write_html(folder: Path, report: Report) -> None:
    """Write report.html. Everything that an endpoint or a bundle said is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_path("report/templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by_check = {f.check: f for f in report.findings.findings}
    details = by_check["weights"].details if "weights" in by_check else {}
    pictures = {}
    if "ladder" in details:
        pictures = {
            "scale": scale_plot(details),
            "direction": direction_plot(details),
            "course": course_plot(details, math.log10(report.policy.differs_e_value)),
        }
    if "text_course" in details:
        pictures = {
            "text_course": text_course_plot(details["text_course"], math.log10(report.policy.differs_e_value)),
            "text_departures": text_departures_plot(details),
        }
    if "whole_course" in details:
        pictures["whole_course"] = text_course_plot(
            details["whole_course"], math.log10(report.policy.differs_e_value), whole=True
        )
    page = environment.get_template("report.html").render(
        report=report, verdict=report.verdict, findings=report.findings.findings, capability=report.findings.capability,
        details=details, pictures=pictures, marks=MARKS, words=WORDS, prose=prose(),
        prompt=by_check["prompt"].details if "prompt" in by_check else {},
        parameters=by_check["parameters"].details.get("parameters", {}) if "parameters" in by_check else {},
    )  # fmt: skip
    write_atomically(folder / "report.html", page.encode())
