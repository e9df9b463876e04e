"""What a reader can do about an endpoint that does not answer."""

from weighbridge.records import Observation

_NEXT_STEPS = {
    "unknown_host": "Check the host in base_url",
    "refused": "Check that the server runs and that base_url names its port",
    "tls": "Check the host's certificate",
    "timeout": "Run `weighbridge resume` later, or raise limits.timeout_s",
    "connection_lost": "Run `weighbridge resume` later",
    "too_large": "Ask the host why a one-token answer is this large",
    "bad_encoding": "Ask the host why it encodes answers in a way that was not asked for",
    "redirect": "Give the address it points to as base_url, if you trust it",
    "http_400": "Check the model's name and extra_body",
    "http_401": "Check the key in the variable that api_key_env names",
    "http_402": "Check the account's balance",
    "http_403": "Check what the key may do",
    "http_404": "Check base_url and the model's name",
    "http_429": "Run `weighbridge resume` later, or set limits.requests_per_minute",
    "html": "Check base_url; it seems to lead to a web page",
    "truncated_json": "Run `weighbridge resume` later",
    "not_json": "Check base_url",
    "not_an_object": "Check base_url",
    "error_object": "Read the host's message",
    "no_content": "Check base_url and dialect: the answer is no message",
    "no_choices": "Ask the host why its answers have no choices",
}


def explain(observation: Observation) -> str:
    """One line on why a request was not answered, and the next step."""
    fault = observation.fault or "no answer"
    step = _NEXT_STEPS.get(fault, "Run `weighbridge resume` later" if fault.startswith("http_5") else "Ask the host")
    return f"{fault}: {observation.fault_detail or 'no explanation'}. {step}"
