"""Which sampling parameters are honoured, ignored, clamped or refused, by what became of one short text."""

from typing import Any, Literal

from weighbridge.judge.case import Case
from weighbridge.records import Finding, Observation, Outcome
from weighbridge.sampling import PENALTY, STOP, TEXT_TOKENS

Treatment = Literal["honoured", "ignored", "refused", "no_effect", "unclear", "not_asked"]
# Part of the API that every host of this kind offers; the others are extensions, which nobody has to know.
STANDARD = ("seed", "stop", "max_tokens", "n", "logit_bias", "frequency_penalty", "presence_penalty", "top_p")
CLEAR_NATS = 0.25  # by which a penalty has to exceed a lead
_REFUSALS = ("http_400", "http_422", "error_object", "http_404", "http_501")


def check_parameters(case: Case) -> Finding:
    """Say of each parameter what became of it. A refusal is an answer; what is dropped in silence is not."""
    if not any(o.answered for o in case.sampling.values()):
        asked = bool(case.sampling)
        return _finding(
            "not_supported" if asked else "inconclusive",
            "No request with sampling parameters was answered" if asked else "Sampling parameters were not asked for",
            to_resolve="Raise --max-requests",
        )
    found = treatments(case)
    ignored = [name for name in STANDARD if found[name] == "ignored"]
    by_word = {
        word: [n for n, t in found.items() if t == word] for word in ("honoured", "ignored", "refused", "unclear")
    }
    text = "; ".join(f"{word.replace('_', ' ')}: {', '.join(names)}" for word, names in by_word.items() if names)
    outcome: Outcome = "inconsistent" if ignored else "consistent" if by_word["honoured"] else "inconclusive"
    return _finding(
        outcome, f"Parameters {text}", details={"parameters": found, "texts": _texts(case)},
        to_resolve="Honour these parameters, or refuse them openly" if ignored else None,
    )  # fmt: skip


def treatments(case: Case) -> dict[str, Treatment]:
    """What became of each parameter."""
    return {
        "temperature": _temperature(case),
        "top_p": _narrowed(case, "top-p"),
        "top_k": _narrowed(case, "top-k"),
        "min_p": _narrowed(case, "min-p"),
        "seed": _seed(case),
        "frequency_penalty": _penalty(case, "frequency"),
        "presence_penalty": _penalty(case, "presence"),
        "stop": _stop(case),
        "max_tokens": _max_tokens(case),
        "n": _two(case),
        "logit_bias": _bias(case),
        "tools": _tools(case),
    }


def is_cold_text(case: Case, name: str) -> bool | None:
    """Whether a request gave the text of temperature 0; None where one of them has none, or they are the same by necessity."""
    cold, other = _text(case, "cold"), _text(case, name)
    return None if cold is None or other is None else cold == other


def _text(case: Case, name: str) -> str | None:
    observation = case.sampling.get(name)
    return observation.text if observation is not None and observation.answered and observation.text else None


def _refused(case: Case, name: str) -> Treatment | None:
    observation = case.sampling.get(name)
    if observation is None:
        return "not_asked"
    if not observation.answered:
        return "refused" if observation.fault in _REFUSALS else "unclear"
    return None


def _varies(case: Case) -> bool:
    """Whether temperature 1 gives another text than temperature 0 at all."""
    return is_cold_text(case, "warm") is False or not (_text(case, "warm-other") or "").startswith(
        _text(case, "cold") or ""
    )


def _temperature(case: Case) -> Treatment:
    refused = _refused(case, "cold-again")
    if refused is not None:
        return refused
    if is_cold_text(case, "cold-again") is None or not _varies(case):
        return "unclear"
    return "honoured" if is_cold_text(case, "cold-again") else "unclear"


def _narrowed(case: Case, name: str) -> Treatment:
    """A setting that leaves only the likeliest token must give the text of temperature 0."""
    refused = _refused(case, name)
    if refused is not None:
        return refused
    # A longer text begins with that of temperature 0, and a shorter one is its beginning.
    cold, other = _text(case, "cold"), _text(case, name)
    same = None if cold is None or other is None else other.startswith(cold) or cold.startswith(other)
    if same is None or not _varies(case):
        return "unclear"
    # Arithmetic that is not the same each time gives another text at temperature 0 as well.
    return "honoured" if same else "ignored" if is_cold_text(case, "cold-again") else "unclear"


def _seed(case: Case) -> Treatment:
    refused = _refused(case, "warm-again")
    if refused is not None:
        return refused
    one, again, other = (_text(case, name) for name in ("warm", "warm-again", "warm-other"))
    if one is None or again is None or other is None:
        return "unclear"
    if one == again:
        return "honoured" if not other.startswith(one) else "unclear"
    return "ignored" if is_cold_text(case, "cold-again") else "unclear"


def _penalty(case: Case, name: str) -> Treatment:
    """A text that repeats one word has to change under a penalty on repeating."""
    refused = _refused(case, name)
    if refused is not None:
        return refused
    plain, punished = _text(case, "red"), _text(case, name)
    if plain is None or punished is None:
        return "unclear"
    if plain != punished:
        return "honoured"
    return "ignored" if _would_change(case.sampling["red"], growing=name == "frequency") else "unclear"


def _would_change(observation: Observation, *, growing: bool) -> bool:
    """Whether a penalty must have changed a text: somewhere a token comes again whose lead over an unseen one is smaller than it."""
    seen: dict[str, int] = {}
    for position in observation.positions or []:
        drawn = position.bytes_hex
        unseen = next((t for t in position.top if t.bytes_hex not in seen and t.bytes_hex != drawn), None)
        if drawn in seen and unseen is not None and position.logprob_nats is not None:
            penalty = PENALTY * (seen[drawn] if growing else 1)
            if position.logprob_nats - unseen.logprob_nats < penalty - CLEAR_NATS:
                return True
        if drawn:
            seen[drawn] = seen.get(drawn, 0) + 1
    return False


def _stop(case: Case) -> Treatment:
    refused = _refused(case, "stop")
    if refused is not None:
        return refused
    cold, observation = _text(case, "cold"), case.sampling["stop"]
    if cold is None or STOP not in cold:
        return "unclear"
    return (
        "ignored"
        if STOP in (observation.text or "") and len(observation.text or "") > cold.index(STOP) + 1
        else "honoured"
    )


def _max_tokens(case: Case) -> Treatment:
    texts = [o for n, o in case.sampling.items() if n in ("cold", "warm", "stream") and o.answered]
    counts = [_tokens(o) for o in texts]
    known = [c for c in counts if c is not None]
    if not known:
        return "unclear" if texts else "not_asked"
    return "honoured" if max(known) <= TEXT_TOKENS else "ignored"


def _tokens(observation: Observation) -> int | None:
    return len(observation.positions) if observation.positions else observation.completion_tokens


def _two(case: Case) -> Treatment:
    refused = _refused(case, "two")
    if refused is not None:
        return refused
    choices = case.sampling["two"].choices
    return "unclear" if choices is None else "honoured" if choices == 2 else "ignored"


def _bias(case: Case) -> Treatment:
    refused = _refused(case, "bias")
    if refused is not None:
        return refused
    if case.library is None:
        return "unclear"
    request = next(r for r in case.plan.sampling_requests if r.probe.id == "sampling-bias")
    wanted = case.library.bundle.vocabulary[int(next(iter(request.settings["logit_bias"])))].decode("utf-8", "replace")
    text = case.sampling["bias"].text
    return "unclear" if text is None else "honoured" if text.strip().startswith(wanted.strip()) else "ignored"


def _tools(case: Case) -> Treatment:
    """Tools are told to the model only if they make the prompt longer; many templates have no place for them."""
    refused = _refused(case, "tools")
    if refused is not None:
        return refused
    messages = next(r.probe.messages for r in case.plan.sampling_requests if r.probe.id == "sampling-tools")
    plain = next((r.probe.id for r in case.plan.prompt_requests if r.probe.messages == messages), None)
    without = next((o.prompt_tokens for o in case.prompt_answers if o.probe_id == plain), None)
    told = case.sampling["tools"].prompt_tokens
    return "unclear" if without is None or told is None else "honoured" if told > without else "no_effect"


def _texts(case: Case) -> dict[str, str]:
    return {name: o.text[:80] for name, o in case.sampling.items() if o.text}


def _finding(outcome: Outcome, summary: str, **more: Any) -> Finding:
    return Finding(check="parameters", axis="service", outcome=outcome, summary=summary, **more)
