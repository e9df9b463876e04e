"""A server of local weights through PyTorch and transformers (extra ``hf``), in a process of its own.

It does what llama.cpp's server cannot: prompt logprobs, rounded activations, further KV caches, and logprobs of an
answer that ends at once. Logprobs are those before bias, penalties and temperature. What a request says is honoured
or refused, never passed over. The lab's own chat templates are rendered in this process; give it no other's.

Run as a module it serves until its standard input closes, so that it never outlives whoever started it.
"""

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, ValidationError

from weighbridge.lab.json_http import JsonHandler
from weighbridge.lab.process import ModelServer
from weighbridge.lab.sampling import Answer, Position, Sampler, Sampling
from weighbridge.records import Message, Record
from weighbridge.reference.checkpoint import open_checkpoint, read_vocabulary
from weighbridge.reference.local import LocalSetting, LocalWeights

START_TIMEOUT_S = 300.0
CONTEXT_TOKENS = 4096
MAX_PROMPT_LOGPROBS_TOKENS = 2048  # their whole distributions are in the memory at once
MAX_CACHED_TOKENS = 2**16
DEFAULT_COMPLETION_TOKENS = 16


class TorchServer(ModelServer):
    """A running server of local weights; a context manager.

    Parameters
    ----------
    folder : pathlib.Path
        The model's, in the Hugging Face layout.
    template : str
        A chat template of the lab's.
    setting : LocalSetting
        How the weights are run.
    log : pathlib.Path
        Where the server's own messages go.
    """

    def __init__(self, folder: Path, template: str, setting: LocalSetting, log: Path) -> None:
        arguments = {"folder": str(folder), "template": template, "setting": setting.model_dump(mode="json")}
        super().__init__("weighbridge.lab.torch_server", arguments, "the local-weights server", log, START_TIMEOUT_S)


def lab_template(template: str) -> Template:
    """One of the lab's own chat templates, to be rendered in this process."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)


# From here on: what the process of the server runs.


class _RefusedError(Exception):
    """A request cannot be served; says why."""


class _Request(Sampling):
    model: str = ""
    max_tokens: int | None = Field(default=None, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False


class _ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0)


class _CompletionRequest(_Request):
    prompt: str | list[int]
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool = False


class _TokenizeRequest(Record):
    """As vLLM asks (``prompt``) or llama.cpp (``content``); no token is ever added, special ones are read as such."""

    model: str = ""
    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = False
    add_special: bool = False
    parse_special: bool = True


class _Service:
    """The model behind the handlers. All its work is done in one thread, whoever asks."""

    def __init__(self, folder: Path, template: str, setting: LocalSetting) -> None:
        checkpoint = open_checkpoint(folder, {})
        self.name = folder.name
        self._template = lab_template(template)
        self._special_tokens = checkpoint.special_tokens
        self._weights = LocalWeights(checkpoint, setting)
        self._vocabulary = read_vocabulary(checkpoint)
        self._sampler = Sampler(self._weights, self._vocabulary)
        self._context = min(CONTEXT_TOKENS, self._weights.context_tokens)
        self._worker = ThreadPoolExecutor(max_workers=1)

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /tokenize."""
        asked = _TokenizeRequest.model_validate(body)
        given = [value for value in (asked.prompt, asked.content, asked.messages) if value is not None]
        if len(given) != 1:
            raise _RefusedError("name one of prompt, content and messages")
        tokens = self._tokens(given[0])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self._context}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/chat/completions."""
        if "max_completion_tokens" in body:
            body["max_tokens"] = body.pop("max_completion_tokens")
        asked = _ChatRequest.model_validate(body)
        if asked.top_logprobs and not asked.logprobs:
            raise _RefusedError("top_logprobs needs logprobs")
        if asked.max_tokens == 0:
            raise _RefusedError("max_tokens must be at least 1")
        if asked.continue_final_message == asked.add_generation_prompt:
            raise _RefusedError("set one of add_generation_prompt and continue_final_message")
        prompt = self._tokens(asked.messages, continued=asked.continue_final_message)
        inside, answers = self._answers(prompt, asked, asked.top_logprobs, asked.prompt_logprobs)
        document = self._document("chat.completion", prompt, answers)
        for choice, answer in zip(document["choices"], answers, strict=True):
            entries = [
                self._entry(position.token_id, position.logprob, asked)
                | {"top_logprobs": [self._entry(token, logprob, asked) for token, logprob in position.top]}
                for position in answer.positions
            ]
            choice["message"] = {"role": "assistant", "content": answer.text}
            choice["logprobs"] = {"content": entries} if asked.logprobs else None
            choice |= {"token_ids": answer.token_ids} if asked.return_token_ids else {}
        document |= {"prompt_token_ids": prompt} if asked.return_token_ids else {}
        return document | self._prompt_logprobs(inside, asked)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/completions."""
        asked = _CompletionRequest.model_validate({"max_tokens": DEFAULT_COMPLETION_TOKENS, **body})
        if asked.max_tokens == 0 and not asked.echo:
            raise _RefusedError("max_tokens must be at least 1 without echo")
        prompt = self._tokens(asked.prompt)
        wanted = [asked.prompt_logprobs, asked.logprobs if asked.echo else None]
        inside, answers = self._answers(
            prompt, asked, asked.logprobs or 0, max((k for k in wanted if k is not None), default=None)
        )
        document = self._document("text_completion", prompt, answers)
        for choice, answer in zip(document["choices"], answers, strict=True):
            echoed: list[Position | None] = [None, *inside] if asked.echo else []
            choice["text"] = (self._sampler.text(prompt) if asked.echo else "") + answer.text
            choice["logprobs"] = None
            if asked.logprobs is not None:
                token_ids = (prompt if asked.echo else []) + answer.token_ids
                choice["logprobs"] = self._listed(token_ids, [*echoed, *answer.positions], asked)
            if asked.return_token_ids:
                choice |= {"token_ids": answer.token_ids, "prompt_token_ids": prompt}
            choice |= self._prompt_logprobs(inside, asked)
        return document

    def _tokens(self, prompt: str | list[int] | list[Message], *, continued: bool = False) -> list[int]:
        """Token ids of a text, of a conversation up to the assistant's turn (or into it), or as given."""
        if isinstance(prompt, list) and isinstance(prompt[0] if prompt else None, Message):
            messages = [message.model_dump() for message in prompt if isinstance(message, Message)]
            try:
                last = messages.pop()["content"] if continued else ""
                prompt = self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
                prompt += last
            except TemplateError as error:
                raise _RefusedError(f"the chat template refuses this conversation ({error})") from None
        if isinstance(prompt, str):
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise _RefusedError("the prompt holds half a character (a lone surrogate)")
            prompt = [*self._weights.tokenize([prompt])[0]]
        tokens = [token for token in prompt if isinstance(token, int)]
        if not tokens or not all(0 <= token < len(self._vocabulary) for token in tokens):
            raise _RefusedError(f"the prompt must hold tokens, with ids from 0 to {len(self._vocabulary) - 1}")
        return tokens

    def _answers(
        self, prompt: list[int], asked: _Request, top: int, prompt_top: int | None
    ) -> tuple[list[Position], list[Answer]]:
        """Check the limits and have the model answer."""
        room = self._context - len(prompt)
        length = room if asked.max_tokens is None else asked.max_tokens
        if length > room or room < 1:
            raise _RefusedError(
                f"the context holds {self._context} tokens, the prompt has {len(prompt)} and max_tokens is {length}"
            )
        if asked.n > 1 and length > 1 and asked.n * (len(prompt) + length) > MAX_CACHED_TOKENS:
            raise _RefusedError(f"n times the prompt and max_tokens must be at most {MAX_CACHED_TOKENS} tokens")
        if prompt_top is not None and len(prompt) > MAX_PROMPT_LOGPROBS_TOKENS:
            raise _RefusedError(f"logprobs are given of prompts of at most {MAX_PROMPT_LOGPROBS_TOKENS} tokens")
        size = len(self._vocabulary)
        if max(top, prompt_top or 0) > size or any(not 0 <= token < size for token in asked.logit_bias):
            raise _RefusedError(f"the vocabulary has {size} tokens")
        return self._worker.submit(self._sampler.answer, prompt, asked, length, top, prompt_top).result()

    def _document(self, kind: str, prompt: list[int], answers: list[Answer]) -> dict[str, Any]:
        """What both kinds of answer have in common."""
        drawn = sum(len(answer.token_ids) for answer in answers)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": drawn, "total_tokens": len(prompt) + drawn}
        choices = [{"index": i, "finish_reason": answer.finish_reason} for i, answer in enumerate(answers)]
        return {"object": kind, "created": int(time.time()), "model": self.name, "choices": choices, "usage": usage}

    def _entry(self, token: int, logprob: float, asked: _Request) -> dict[str, Any]:
        """A token in a chat's logprobs; like llama.cpp's, with the id besides."""
        name = self._name(token, asked)
        return {"id": token, "token": name, "bytes": [*self._vocabulary[token]], "logprob": logprob}

    def _name(self, token: int, asked: _Request) -> str:
        return f"token_id:{token}" if asked.return_tokens_as_token_ids else self._sampler.text([token])

    def _listed(
        self, token_ids: list[int], positions: list[Position | None], asked: _CompletionRequest
    ) -> dict[str, Any]:
        """A completion's logprobs; of tokens with the same text, the list has the most likely one."""

        def tops(position: Position) -> dict[str, float]:
            found: dict[str, float] = {}
            for token, logprob in position.top[: asked.logprobs]:
                found.setdefault(self._name(token, asked), logprob)
            return found

        texts = [self._sampler.text([token]) for token in token_ids]
        return {
            "tokens": [self._name(token, asked) for token in token_ids],
            "token_logprobs": [p.logprob if p else None for p in positions],
            "top_logprobs": [tops(p) if p else None for p in positions],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def _prompt_logprobs(self, inside: list[Position], asked: _Request) -> dict[str, Any]:
        """The prompt's logprobs in vLLM's shape: nothing of the first token, then the likely ones and the actual one."""
        if asked.prompt_logprobs is None:
            return {}
        rows: list[dict[str, Any] | None] = [None]
        for position in inside:
            listed = [
                (token, logprob, i) for i, (token, logprob) in enumerate(position.top[: asked.prompt_logprobs], 1)
            ]
            listed.append((position.token_id, position.logprob, position.rank))
            rows.append({
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": self._sampler.text([token])}
                for token, logprob, rank in listed
            })  # fmt: skip
        return {"prompt_logprobs": rows}


class _Handler(JsonHandler):
    service: ClassVar[_Service]
    paths = ("/v1/chat/completions", "/v1/completions", "/tokenize")

    def answer(self, path: str, body: dict[str, Any]) -> None:
        """Answer, or say what of the request cannot be honoured; the model's name is not looked at."""
        routes = (self.service.chat, self.service.complete, self.service.tokenize)
        route = routes[self.paths.index(path)]
        if isinstance(body.get("stop"), str):
            body["stop"] = [body["stop"]]
        try:
            document = route({field: value for field, value in body.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            self.send_problem(400, f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg'][:200]}")
        except _RefusedError as error:
            self.send_problem(400, str(error))
        else:
            self.send_document(200, document)


def _serve(arguments: str) -> None:
    # OpenMP's threads must not spin while they wait: on a busy machine that makes an answer ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = json.loads(arguments)
    service = _Service(Path(given["folder"]), given["template"], LocalSetting.model_validate(given["setting"]))
    handler = type("Handler", (_Handler,), {"service": service, "model_name": service.name})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("serving", f"http://127.0.0.1:{server.server_address[1]}", flush=True)  # noqa: T201
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
