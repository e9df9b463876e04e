"""Who answered: what answers, listings and records name, and whether the route was pinned."""

from collections import Counter
from typing import Any

from weighbridge.judge.case import Case
from weighbridge.records import AnswerRecord, Finding, ListedEndpoint

_MOST_SHOWN = 20


def check_route(case: Case) -> Finding:
    """Who answered: the model and the provider that answers name, against the ones that were asked for."""
    if not case.capability.reachable:
        return Finding(
            check="route",
            axis="route",
            outcome="error",
            summary="The endpoint did not answer" if case.capability.refused else "Nothing was asked",
        )
    finding, named = _by_model(case), _providers(case)
    if case.plan.endpoint.provider is not None:
        finding = _pinned(case.plan.endpoint.provider, finding, named, _listed(case))
    elif len(named) > 1:
        finding = Finding(
            check="route", axis="route", outcome="inconclusive",
            summary=f"No provider was pinned, and several answered: {_quoted(named)}",
            to_resolve="Set `provider` in the endpoint's file, so that one provider answers everything",
        )  # fmt: skip
    elif case.plan.endpoint.unpinned:
        finding = Finding(
            check="route", axis="route", outcome="not_supported",
            summary=f"The route was not pinned, so the router chose who answers{f': {_quoted(named)}' if named else ''}",
            to_resolve="Set `provider` in the endpoint's file to the slug of the provider that is to be audited",
        )  # fmt: skip
    return finding.model_copy(
        update={"summary": "; ".join([finding.summary, *_notes(case)]), "details": finding.details | _details(case)}
    )


def _by_model(case: Case) -> Finding:
    """The model that the answers name against the one that was asked for."""
    named = sorted(
        {o.model_named for o in case.answers if o.model_named}
        | ({case.capability.model_named} if case.capability.model_named else set())
    )
    known = {case.plan.endpoint.model.casefold()}
    if case.library is not None:
        known |= {name.casefold() for name in case.library.bundle.manifest.model_names}
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


def _pinned(slug: str, by_model: Finding, named: Counter[str], listed: list[ListedEndpoint]) -> Finding:
    """The providers that are named against the pinned one.

    A name is another provider's where the listing gives it to another one, or gives the pinned one a name that is nothing like it.
    Without a listing it is not known how the provider signs its answers.
    """
    if not named:
        return Finding(
            check="route", axis="route", outcome="inconclusive",
            summary=f"The route was pinned to {slug!r}, and nothing names who answered",
            to_resolve="A router that names the provider in its answers or in its records of them",
        )  # fmt: skip
    own = {_plain(e.provider_name) for e in listed if e.provider_name and _is_tag_of(slug, e.tag)}
    others = {_plain(e.provider_name) for e in listed if e.provider_name and not _is_tag_of(slug, e.tag)} - own
    known = own | {_plain(slug.partition("/")[0])}
    strange = {name: n for name, n in named.items() if _plain(name) not in known}
    foreign = Counter({
        name: n for name, n in strange.items() if _plain(name) in others or (own and not _is_like(_plain(name), known))
    })  # fmt: skip
    if foreign:
        return Finding(
            check="route", axis="route", outcome="inconsistent", cause="route",
            summary=f"The route was pinned to {slug!r}, and {foreign.total()} of {named.total()} answers and records name {_quoted(foreign)}",
        )  # fmt: skip
    if strange:
        return Finding(
            check="route", axis="route", outcome="inconclusive",
            summary=f"The route was pinned to {slug!r}, and answers name {_quoted(strange)}; whether that is the same is not known",
            to_resolve="A listing that gives the name of the pinned provider",
        )  # fmt: skip
    pinned = f"Everything that names a provider names the pinned one, {_quoted(named)}"
    return by_model.model_copy(update={"summary": f"{pinned}; {by_model.summary[0].lower()}{by_model.summary[1:]}"})


def _is_tag_of(slug: str, tag: str | None) -> bool:
    """Whether a listed tag, such as ``acme/fp8``, is the provider's: a slug may be that of all its variants, or of one."""
    return tag is not None and slug.partition("/")[0] == tag.partition("/")[0]


def _is_like(name: str, known: set[str]) -> bool:
    """Whether a name may be a longer or a shorter form of one of the others."""
    return any(name.startswith(other) or other.startswith(name) for other in known)


def _plain(name: str) -> str:
    """A name as slugs are made from it."""
    return "".join(c for c in name.casefold() if c.isalnum())


def _quoted(names: Counter[str] | dict[str, int]) -> str:
    shown = [repr(name) for name in sorted(names)]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _providers(case: Case) -> Counter[str]:
    """How many answers and records name each provider."""
    answers = [o.provider_named for o in (*case.capability_answers, *case.observed)]
    return Counter(name for name in (*answers, *(r.provider_named for r in _records(case))) if name)


def _listed(case: Case) -> list[ListedEndpoint]:
    return [e for o in case.route if o.listing is not None for e in o.listing.endpoints or []]


def _records(case: Case) -> list[AnswerRecord]:
    return [o.record for o in case.route if o.record is not None]


def _counted(case: Case) -> dict[str, int | None]:
    """The prompt tokens that each answer reports, by the name of the answer."""
    answers = (*case.capability_answers, *case.observed)
    return {o.answer_id: o.prompt_tokens for o in answers if o.answer_id is not None}


def _notes(case: Case) -> list[str]:
    """What the router's records say beyond names."""
    records, counted = _records(case), _counted(case)
    notes = []
    apart = [(r.native_prompt_tokens, counted.get(r.answer_id)) for r in records]
    apart = [(native, told) for native, told in apart if None not in (native, told) and native != told]
    if apart:
        native, told = apart[0]
        notes.append(
            f"{len(apart)} of {len(records)} records count other prompt tokens than their answers ({native}, not {told})"
        )
    again = sum((r.provider_responses or 0) > 1 for r in records)
    if again:
        notes.append(f"{again} of {len(records)} records tell of more than one attempt at a provider")
    return notes


def _details(case: Case) -> dict[str, Any]:
    """What was claimed and what was named, as far as there is any of it."""
    endpoint, counted = case.plan.endpoint, _counted(case)
    listing = next((o.listing for o in case.route if o.listing is not None), None)
    details: dict[str, Any] = {}
    if providers := _providers(case):
        details["providers"] = dict(sorted(providers.items())[:_MOST_SHOWN])
    if endpoint.provider is not None:
        details["pinned"] = endpoint.provider
    if listing is not None and listing.endpoints is not None:
        shown = [e for e in listing.endpoints if endpoint.provider is None or _is_tag_of(endpoint.provider, e.tag)]
        kept = {"provider_name", "tag", "quantization", "context_length"}
        details["claim"] = {
            "precision": endpoint.claimed_precision,
            "listed": [e.model_dump(include=kept) for e in shown[:_MOST_SHOWN]],
        }
    elif listing is not None:
        details["listing"] = {"models": listing.models, "names_model": listing.names_model}
    if records := _records(case):
        details["records"] = [r.model_dump() | {"prompt_tokens": counted.get(r.answer_id)} for r in records]
    return details
