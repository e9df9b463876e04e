"""How each kind of API is asked and read: a request in, an observation out.

A dialect is one of the three extension points. It is pure: it builds the body of a request and reads the bytes
of an answer, and every quirk that it meets becomes a named entry of ``Observation.quirks``.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from weighbridge.dialects.anthropic_messages import AnthropicMessages
from weighbridge.dialects.openai_chat import OpenAIChat
from weighbridge.records import Endpoint, Exchange, Observation, PlannedRequest


class Dialect(Protocol):
    """One kind of API.

    Attributes
    ----------
    gives_logprobs : bool
        Whether the API has logprobs at all; where it has none, nobody is asked for any.
    key_header : str
        The header in which a key is sent: ``authorization`` as a bearer token, any other one as it is.
    headers : mapping
        What goes with every request besides.
    """

    gives_logprobs: bool
    key_header: str
    headers: Mapping[str, str]

    def path(self, request: PlannedRequest) -> str:
        """Where a request is sent, relative to the base URL."""
        ...

    def asks(self, request: PlannedRequest) -> bool:
        """Whether a request is about something that the API has; what it lacks is neither asked nor imitated."""
        ...

    def body(
        self,
        endpoint: Endpoint,
        request: PlannedRequest,
        *,
        temperature: float,
        top_logprobs: int,
        seed: int,
        prompt_ids: list[int],
    ) -> dict[str, Any]:
        """The JSON body that asks a request, with every sampling parameter stated; `prompt_ids` are those of a raw one."""
        ...

    def observe(self, probe_id: str, attempts: list[Exchange]) -> Observation:
        """Read the flat facts from the attempts of one request; the last one decides."""
        ...


DIALECTS: dict[str, Dialect] = {"openai-chat": OpenAIChat(), "anthropic-messages": AnthropicMessages()}
