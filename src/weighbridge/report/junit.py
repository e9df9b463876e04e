"""junit.xml: one test case for each axis, so that a build server shows what is wrong."""

import re
from pathlib import Path
from xml.etree import ElementTree

from weighbridge.canonical import write_atomically
from weighbridge.report.document import Report

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(folder: Path, report: Report) -> None:
    """Write junit.xml: inconsistent axes that the policy requires fail, unanswered ones are skipped."""
    required = set(report.policy.requires)
    suite = ElementTree.Element(
        "testsuite", name=clean(f"weighbridge {report.endpoint.name}"), timestamp=report.created_at[:19]
    )
    failures = skipped = errors = 0
    for finding in report.findings.findings:
        case = ElementTree.SubElement(
            suite, "testcase", classname="weighbridge", name=f"{finding.axis}: {finding.check}", time="0"
        )
        if finding.outcome == "inconsistent" and finding.axis in required:
            failures += 1
            ElementTree.SubElement(
                case, "failure", message=clean(finding.summary), type=finding.cause or "none_of_these"
            )
        elif finding.outcome == "error":
            errors += 1
            ElementTree.SubElement(case, "error", message=clean(finding.summary))
        elif finding.outcome != "consistent":
            skipped += 1
            ElementTree.SubElement(case, "skipped", message=clean(f"{finding.outcome}: {finding.summary}"))
    for name, value in (
        ("tests", len(report.findings.findings)),
        ("failures", failures),
        ("errors", errors),
        ("skipped", skipped),
    ):
        suite.set(name, str(value))
    properties = ElementTree.Element("properties")
    for name, text in (
        ("verdict", report.verdict.verdict),
        ("cause", report.verdict.cause or ""),
        ("policy", report.policy.id),
    ):
        ElementTree.SubElement(properties, "property", name=name, value=clean(text))
    suite.insert(0, properties)
    write_atomically(folder / "junit.xml", ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


def clean(text: str) -> str:
    """Leave out what XML cannot hold."""
    return _NOT_XML.sub("�", text)
