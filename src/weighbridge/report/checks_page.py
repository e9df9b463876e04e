"""docs/CHECKS.md, made from the prose of the checks: ``python -m weighbridge.report.checks_page`` writes it."""

from pathlib import Path

from weighbridge.judge.checks import prose

PAGE = Path(__file__).resolve().parents[3] / "docs" / "CHECKS.md"
_HEAD = """# The checks of an audit

Made from `src/weighbridge/judge/checks/checks.toml` by `python -m weighbridge.report.checks_page`; a report shows the same words.
Each check is a pure function from what was observed to one finding, in a module of its own name in `src/weighbridge/judge/checks/`.
An outcome is *consistent*, *inconsistent*, *inconclusive*, *not supported*, *not applicable* or *error*; an endpoint that answers nothing
of what a check asks gets *not supported* or *inconclusive*, never a clean bill.
"""


def checks_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for name, text in prose().items():
        parts.append(
            f"## `{name}`: {text.title[0].lower()}{text.title[1:]}\n\n"
            f"**What it measures.** {text.measures}\n\n**What it does not prove.** {text.does_not_prove}\n\n"
            f"**How a host mends it.** {text.fix}\n\n**Cost.** {text.cost}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(checks_page(), "utf-8")
