"""Who answered: what answers and listings name, and whether the route could be pinned."""

from weighbridge.judge.case import Case
from weighbridge.records import Finding


def check_route(case: Case) -> Finding:
    """Who answered: the model that the answers name against the one that was asked for."""
    named = sorted(
        {o.model_named for o in case.answers if o.model_named}
        | ({case.capability.model_named} if case.capability.model_named else set())
    )
    known = {case.plan.endpoint.model.casefold()}
    if case.library is not None:
        known |= {name.casefold() for name in case.library.bundle.manifest.model_names}
    if not case.capability.reachable:
        return Finding(
            check="route",
            axis="route",
            outcome="error",
            summary="The endpoint did not answer" if case.capability.refused else "Nothing was asked",
        )
    if not named:
        return Finding(
            check="route",
            axis="route",
            outcome="inconclusive",
            summary="The answers name no model",
            to_resolve="Ask the host to name the model that answers",
        )
    if all(name.casefold() in known for name in named):
        return Finding(
            check="route",
            axis="route",
            outcome="consistent",
            summary=f"Every answer names {named[0]!r}; a name is the host's own word",
        )
    return Finding(
        check="route", axis="route", outcome="inconclusive", details={"named": named},
        summary=f"The answers name {', '.join(repr(n) for n in named[:3])}, the request named {case.plan.endpoint.model!r}; a name alone proves nothing",
        to_resolve="Ask the host what these names stand for",
    )  # fmt: skip
