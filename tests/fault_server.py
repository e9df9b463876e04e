"""A small HTTP host on loopback that fails in one named way. It is for faults only: nothing is detected with it."""

import gzip
import json
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self

MODEL = "SmolLM2-135M-Instruct"
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Request:
    """What came in."""

    number: int
    path: str
    headers: dict[str, str]
    document: dict[str, Any]

    @property
    def bearer(self) -> str:
        """The key that was sent, or nothing."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def api_key(self) -> str:
        """The key that was sent as Anthropic has it, or nothing."""
        return self.headers.get("x-api-key", "")

    @property
    def prompt(self) -> str:
        """What tells one probe from another."""
        return json.dumps(self.document.get("messages", self.document.get("prompt")))


class Call:
    """One request and the connection on which it may be answered."""

    def __init__(self, request: Request, handler: "_Handler") -> None:
        self.request = request
        self._handler = handler

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Answer as HTTP has it."""
        self.start(status, {"content-type": "application/json", "content-length": str(len(body))} | (headers or {}))
        self.write(body)

    def send_json(self, status: int, document: object, headers: dict[str, str] | None = None) -> None:
        """Answer with a JSON document; NaN is written as Python writes it."""
        self.send(status, json.dumps(document).encode(), headers)

    def start(self, status: int, headers: dict[str, str]) -> None:
        """Send the status line and the headers alone."""
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name, value)
        self._handler.end_headers()

    def write(self, data: bytes) -> None:
        """Send raw bytes and count them."""
        self._handler.wfile.write(data)
        self._handler.wfile.flush()
        self._handler.host.count(len(data))

    def stream(self, chunks: Iterable[bytes]) -> None:
        """Send pieces until they end, the client leaves or the server stops; then close."""
        self._handler.close_connection = True
        for chunk in chunks:
            if self._handler.host.stopping.is_set():
                return
            self.write(chunk)

    def wait(self, seconds: float) -> bool:
        """Wait; true when the server stops."""
        return self._handler.host.stopping.wait(seconds)

    def gone(self) -> bool:
        """Whether the client has closed its end."""
        connection = self._handler.connection
        connection.setblocking(False)
        try:
            return not connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    def drop(self) -> None:
        """Close the connection without an answer."""
        self._handler.close_connection = True


Answer = Callable[[Call], None]


@dataclass
class FaultServer:
    """Serves one `Answer` on a free loopback port while its context is open."""

    answer: Answer
    requests: list[Request] = field(default_factory=list)
    bytes_sent: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0
        handler = type("Handler", (_Handler,), {"host": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.host = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"

    def count(self, sent: int) -> None:
        with self._lock:
            self.bytes_sent += sent

    def note(self, path: str, headers: dict[str, str], document: dict[str, Any]) -> Request:
        with self._lock:
            self._taken += 1
            request = Request(self._taken, path, headers, document)
            self.requests.append(request)
        return request

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if error is None and self.errors:
            raise self.errors[0]


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them
    host: FaultServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what the host itself did wrong; a client that leaves is no error."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.host.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    host: ClassVar[FaultServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 10

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._take({})

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        body = self.rfile.read(length)
        if len(body) < length:  # the client has left
            self.close_connection = True
            return
        self._take(json.loads(body))

    def _take(self, document: dict[str, Any]) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.host.answer(Call(self.host.note(self.path, headers, document), self))


# -- answers that are well formed ------------------------------------------------------------------------------


def entry(token: str, logprob: object) -> dict[str, object]:
    """One entry of top_logprobs."""
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def completion(
    top: list[dict[str, object]] | None, *, content: str = "a", prompt_tokens: object = 50
) -> dict[str, Any]:
    """A chat completion of one token; `top` stands in its logprobs, and None leaves the logprobs null."""
    logprobs = None if top is None else {"content": [{**entry(content, -1.0), "top_logprobs": top}]}
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "length", "logprobs": logprobs}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1},
    }  # fmt: skip


def message(text: str = "a", *, stop_reason: str = "max_tokens", input_tokens: object = 50) -> dict[str, Any]:
    """An answer as Anthropic's API has it."""
    return {
        "id": "msg_01x", "type": "message", "role": "assistant", "model": MODEL,
        "content": [{"type": "text", "text": text}], "stop_reason": stop_reason, "stop_sequence": None,
        "usage": {"input_tokens": input_tokens, "output_tokens": 1},
    }  # fmt: skip


def steady_top(count: int) -> list[dict[str, object]]:
    """A list that is a possible one: falling, and less than 1 in sum."""
    return [entry(chr(ord("a") + n), -2.0 - 0.3 * n) for n in range(count)]


def well_formed(call: Call) -> None:
    """A list of the length that was asked for, always the same one but for the last digits, which differ from prompt to prompt."""
    count = call.request.document.get("top_logprobs", 0)
    top = steady_top(count)
    for entry in top:
        entry["logprob"] = float(str(entry["logprob"])) - zlib.crc32(call.request.prompt.encode()) * 1e-15
    call.send_json(200, completion(top if count else None))


def first(count: int, good: Answer, then: Answer) -> Answer:
    """`good` for the first requests and `then` for the others."""

    def answer(call: Call) -> None:
        (good if call.request.number <= count else then)(call)

    return answer


# -- faults ----------------------------------------------------------------------------------------------------


def refuses(status: int, message: str, **headers: str) -> Answer:
    """An HTTP error with the usual JSON body; keywords are headers, with underscores for hyphens."""

    def answer(call: Call) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        call.send_json(status, {"error": {"message": message, "type": "x"}}, named)

    return answer


def says(document: object) -> Answer:
    """A 200 with that JSON document."""
    return lambda call: call.send_json(200, document)


def error_in_200(call: Call) -> None:
    call.send_json(200, {"error": {"message": "upstream is asleep", "code": 503}})


def html(call: Call) -> None:
    call.send(200, b"<!doctype html><title>Log in</title>", {"content-type": "text/html"})


def truncated_json(call: Call) -> None:
    call.send(200, json.dumps(completion(steady_top(20))).encode()[:-40])


def not_utf8(call: Call) -> None:
    call.send(200, b"\xff\xfe\x00{")


def nothing(call: Call) -> None:
    call.send(200, b"")


def null_logprobs(call: Call) -> None:
    call.send_json(200, completion(None))


def end_of_turn(call: Call) -> None:
    document = completion(None, content="")
    del document["choices"][0]["logprobs"]
    document["choices"][0]["finish_reason"] = "stop"
    call.send_json(200, document)


def empty_choices(call: Call) -> None:
    call.send_json(200, completion(steady_top(20)) | {"choices": []})


def nan_logprobs(call: Call) -> None:
    call.send_json(200, completion([entry("a", float("nan")), *steady_top(20)[1:]]))


def positive_logprobs(call: Call) -> None:
    call.send_json(200, completion([entry("a", 0.7), *steady_top(20)[1:]]))


def probabilities_sum_to_two(call: Call) -> None:
    call.send_json(200, completion([entry(chr(ord("a") + n), -2.302585092994046) for n in range(20)]))


def huge_integer_logprob(call: Call) -> None:
    call.send_json(200, completion([entry("a", -(10**400)), *steady_top(20)[1:]]))


def large_body(call: Call) -> None:
    """100 MB of JSON."""
    call.start(200, {"content-type": "application/json", "content-length": str(100 * MEBIBYTE)})
    call.stream(b" " * MEBIBYTE for _ in range(100))


def gzip_bomb(call: Call) -> None:
    """A gzip stream of a few MB that unpacks to 4 GiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packer.compress(b" " * MEBIBYTE)
    packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(b" " * MEBIBYTE) + packer.flush(zlib.Z_FULL_FLUSH)
    call.start(200, {"content-type": "application/json", "content-encoding": "gzip", "connection": "close"})
    call.write(gzip.compress(b"")[:10])
    call.stream(piece for _ in range(4096))


def broken_gzip(call: Call) -> None:
    call.send(200, b"this was never packed", {"content-encoding": "gzip"})


def unasked_encoding(call: Call) -> None:
    call.send(200, b"\x8b\x00\x80", {"content-encoding": "br"})


def body_without_end(call: Call) -> None:
    """A byte now and then, for ever."""
    call.start(200, {"content-type": "application/json", "connection": "close"})

    def drops() -> Iterable[bytes]:
        while not call.wait(0.02):
            yield b" "

    call.stream(drops())


def silence(call: Call) -> None:
    """Takes the request and never answers."""
    while not call.wait(0.02) and not call.gone():
        pass


def dropped_connection(call: Call) -> None:
    call.drop()


def cut_short(call: Call) -> None:
    """Promises more than it sends, then closes."""
    call.start(200, {"content-type": "application/json", "content-length": "5000"})
    call.stream([b'{"id": "x", '])


def not_http(call: Call) -> None:
    call.stream([b"220 mail.example ESMTP\r\n"])


def redirect_to(url: str) -> Answer:
    """A redirect."""
    return lambda call: call.send(307, b"", {"location": url})
