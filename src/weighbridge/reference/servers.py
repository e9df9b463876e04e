"""Trusted servers on the keeper's own machines, asked with token ids: vLLM, SGLang and llama.cpp.

Weighbridge does not start them. How to start each one so that its numbers can be repeated stands in
docs/REFERENCES.md; the command and environment that were used are recorded as text and never executed.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from weighbridge.errors import BundleError
from weighbridge.records import Endpoint, Limits
from weighbridge.reference.engine import Prompt, Rows, Wanted
from weighbridge.transport import Transport

ServerKind = Literal["vllm", "sglang", "llama.cpp"]

# So many more are asked than are kept, so that another stack's most likely tokens are found in the list.
ASKED_LOGPROBS = 1024
ASKED_PROMPT_LOGPROBS = 256
PROMPT_LOGPROBS_IN_ALL = 100_000  # what fits into the 8 MiB that an answer may have
MAX_TRIES = 12
LEAST_NATS, MOST_NATS = -1e6, 0.01  # of a logprob; servers round, and write a large negative number for minus infinity

Listed = dict[int, float]
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class TrustedServer:
    """One server; each kind is asked in its own way and answers with token ids.

    Parameters
    ----------
    kind : {"vllm", "sglang", "llama.cpp"}
    base_url : str
        The server's root, without /v1.
    model : str
        The name that it serves the model under.
    concurrency : int
        Requests at a time. An honest server answers the same at every load up to rounding, so it is a part of a stack.
    """

    def __init__(self, kind: ServerKind, base_url: str, model: str, *, concurrency: int = 1) -> None:
        self._kind = kind
        self._endpoint = Endpoint(
            name=kind, base_url=base_url, model=model, limits=Limits(timeout_s=600, concurrency=concurrency)
        )

    def facts(self) -> dict[str, Any]:
        """The kind of server and how it was asked; its version and arguments are the keeper's to state."""
        return {"engine": f"{self._kind} server", "concurrency": self._endpoint.limits.concurrency}

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids by the server's own tokenizer."""
        path = {"vllm": "/tokenize", "llama.cpp": "/tokenize", "sglang": "/v1/tokenize"}[self._kind]
        field = "content" if self._kind == "llama.cpp" else "prompt"
        bodies = [{"model": self._endpoint.model, field: text, "add_special_tokens": False, "add_special": False, "parse_special": True} for text in texts]  # fmt: skip
        out = []
        for document in asyncio.run(self._post_all(path, bodies)):
            tokens = document.get("tokens")
            if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
                raise self._broken("gave no token ids when asked to tokenise")
            out.append(tokens)
        return out

    def score(self, prompts: Sequence[Prompt], wanted: Sequence[Wanted], top_k: int) -> list[Rows]:
        """Logprobs at the prompts' positions, looked up in the lists that the server returns."""
        ask = {"vllm": self._vllm, "sglang": self._sglang, "llama.cpp": self._llamacpp}[self._kind]
        listed = asyncio.run(ask(prompts))
        out = []
        for prompt, lists, asked in zip(prompts, listed, wanted, strict=True):
            if min(map(len, lists)) < top_k:
                raise BundleError(
                    f"the {self._kind} server at {self._endpoint.base_url} returned {min(map(len, lists))} logprobs for {prompt.probe_id}, {top_k} are needed",
                    "Raise the server's limit (vLLM: --max-logprobs 1024) or lower top_k in the spec",
                )
            out.append(_rows(lists, asked, top_k))
        return out

    # -- one way of asking for each kind ----------------------------------------------------------------------

    async def _vllm(self, prompts: Sequence[Prompt]) -> list[list[Listed]]:
        bodies = []
        for prompt in prompts:
            body: dict[str, Any] = {
                "model": self._endpoint.model, "prompt": list(prompt.token_ids), "max_tokens": 1, "temperature": 1,
                "top_p": 1, "top_k": 0, "min_p": 0, "seed": 0, "logprobs": ASKED_LOGPROBS, "return_tokens_as_token_ids": True,
            }  # fmt: skip
            if prompt.positions != (len(prompt.token_ids) - 1,):
                # Bounded, because the answer lists them for every token of the prompt, wanted or not.
                body["prompt_logprobs"] = max(
                    20, min(ASKED_PROMPT_LOGPROBS, PROMPT_LOGPROBS_IN_ALL // len(prompt.token_ids))
                )
            bodies.append(body)
        out = []
        for prompt, document in zip(prompts, await self._post_all("/v1/completions", bodies), strict=True):
            try:
                choice = document["choices"][0]
                # The distribution after token i is listed for token i + 1; the last one belongs to the new token.
                inside = choice.get("prompt_logprobs") or []
                top = choice["logprobs"]["top_logprobs"][0].items()
                last = _listed((int(name.removeprefix("token_id:")), value) for name, value in top)
                out.append([
                    last if i == len(prompt.token_ids) - 1
                    else _listed((int(token), entry["logprob"]) for token, entry in inside[i + 1].items())
                    for i in prompt.positions
                ])  # fmt: skip
            except (KeyError, IndexError, TypeError, ValueError, AttributeError):
                raise self._broken(f"answered {prompt.probe_id} without logprobs by token id") from None
        return out

    async def _sglang(self, prompts: Sequence[Prompt]) -> list[list[Listed]]:
        bodies = [
            {
                "input_ids": list(prompt.token_ids), "return_logprob": True, "top_logprobs_num": ASKED_LOGPROBS,
                "logprob_start_len": min(prompt.positions), "return_text_in_logprobs": False,
                "sampling_params": {"max_new_tokens": 1, "temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0},
            }
            for prompt in prompts
        ]  # fmt: skip
        out = []
        for prompt, document in zip(prompts, await self._post_all("/generate", bodies), strict=True):
            try:
                meta = document["meta_info"]
                # input_top_logprobs[j] is what was predicted for the token at logprob_start_len + j.
                inside, first = meta.get("input_top_logprobs") or [], min(prompt.positions)
                lists = [
                    meta["output_top_logprobs"][0] if i == len(prompt.token_ids) - 1 else inside[i + 1 - first]
                    for i in prompt.positions
                ]
                out.append([_listed((entry[1], entry[0]) for entry in one) for one in lists])
            except (KeyError, IndexError, TypeError, ValueError, AttributeError):
                raise self._broken(f"answered {prompt.probe_id} without logprobs by token id") from None
        return out

    async def _llamacpp(self, prompts: Sequence[Prompt]) -> list[list[Listed]]:
        # It scores no prompt, so each position is a request of its own; where all tokens of an answer are wanted it goes on from what it has
        # computed for the one before, as it does when it generates.
        prefixes = [
            (prompt.token_ids[: i + 1], len(prompt.positions) > 1 and prompt.positions[1] == prompt.positions[0] + 1)
            for prompt in prompts for i in prompt.positions
        ]  # fmt: skip
        found = iter(await self._together(self._llamacpp_one, prefixes))
        return [[next(found) for _ in prompt.positions] for prompt in prompts]

    async def _llamacpp_one(self, asked: tuple[Sequence[int], bool]) -> Listed:
        prefix, goes_on = asked
        for seed in range(MAX_TRIES):
            document = await self._post("/completion", {
                "prompt": list(prefix), "n_predict": 1, "n_probs": ASKED_LOGPROBS, "post_sampling_probs": False, "seed": seed,
                "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "cache_prompt": goes_on, "samplers": ["temperature"],
            })  # fmt: skip
            try:
                rows = document["completion_probabilities"]
                return _listed((entry["id"], entry["logprob"]) for entry in rows[0]["top_logprobs"])
            except (KeyError, IndexError):
                continue  # the sampled token was the end of the turn, which it lists nothing for
            except (TypeError, ValueError, AttributeError):
                break
        raise self._broken(f"gave no logprobs by token id in {MAX_TRIES} tries")

    # -- requests ---------------------------------------------------------------------------------------------

    async def _post_all(self, path: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return await self._together(lambda body: self._post(path, body), bodies)

    async def _together(self, ask: Callable[[Asked], Awaitable[Answer]], everything: Sequence[Asked]) -> list[Answer]:
        """Ask so many at a time as the stack says; answers in order."""
        gate = asyncio.Semaphore(self._endpoint.limits.concurrency)

        async def one(asked: Asked) -> Answer:
            async with gate:
                return await ask(asked)

        async with Transport(self._endpoint, None) as self._transport:
            tasks = [asyncio.ensure_future(one(asked)) for asked in everything]
            try:
                return list(await asyncio.gather(*tasks))
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = await self._transport.post(path, body)
        if reply.status != 200 or reply.body is None or reply.failure is not None:
            detail = " ".join((reply.body or b"")[:300].decode("utf-8", "replace").split()) if reply.status else ""
            raise BundleError(
                f"the {self._kind} server at {self._endpoint.base_url} answered {path} with {reply.failure or reply.status}"
                + (f" ({''.join(c if c.isprintable() else '�' for c in detail)})" if detail else ""),
                "Start it as docs/REFERENCES.md says and run the build again; it goes on where it stopped",
            )
        try:
            document = json.loads(reply.body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self._broken("answered something that is no JSON object")
        return document

    def _broken(self, what: str) -> BundleError:
        return BundleError(
            f"the {self._kind} server at {self._endpoint.base_url} {what}",
            "Start it as docs/REFERENCES.md says and run the build again; it goes on where it stopped",
        )


def _listed(entries: Iterable[tuple[Any, Any]]) -> Listed:
    """Logprobs by token id.

    Raises
    ------
    ValueError
        If something is listed that is no token id or no logprob.
    """
    out: Listed = {}
    for token, value in entries:
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError("no token id")
        if type(value) not in (int, float) or not LEAST_NATS < value <= MOST_NATS:
            raise ValueError("no logprob")
        out[token] = float(value)
    return out


def _rows(lists: list[Listed], asked: Wanted, top_k: int) -> Rows:
    """One row for each list: the asked tokens' logprobs, or the most likely ones."""
    ids = np.empty((len(lists), top_k if asked is None else asked.shape[1]), np.int32)
    values = np.full(ids.shape, np.nan, np.float32)
    for i, listed in enumerate(lists):
        if asked is None:
            best = sorted(listed.items(), key=lambda item: (-item[1], item[0]))[:top_k]
            ids[i] = [token for token, _ in best]
            values[i] = [value for _, value in best]
        else:
            ids[i] = asked[i]
            values[i] = [listed.get(int(token), np.nan) for token in asked[i]]
    return Rows(ids, values)
