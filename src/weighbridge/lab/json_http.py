"""What the lab's HTTP hosts share: JSON in, JSON out, with the standard library alone."""

import contextlib
import http.client
import json
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar

MAX_REQUEST_BYTES = 1 << 20
ENGINE_TIMEOUT_S = 120.0


def post_json(port: int, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Post a JSON object to an engine on this machine; the status and the object that it answers with.

    Raises
    ------
    OSError, http.client.HTTPException, ValueError
        If no such answer comes.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ENGINE_TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        document = json.loads(response.read())
        if not isinstance(document, dict):
            raise ValueError("the engine did not answer with an object")
        return response.status, document
    finally:
        connection.close()


class JsonHandler(BaseHTTPRequestHandler):
    """A request handler that speaks JSON and keeps quiet.

    Attributes
    ----------
    model_name : str
        What GET /v1/models lists.
    paths : tuple of str
        Where something can be posted.
    streams : bool
        Whether ``answer`` is given requests for a stream; else they are refused.
    """

    model_name: ClassVar[str]
    paths: ClassVar[tuple[str, ...]]
    streams: ClassVar[bool] = False
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, path: str, body: dict[str, Any]) -> None:
        """Answer what was posted to one of the paths."""
        raise NotImplementedError

    def handle(self) -> None:
        """Serve one connection; a customer may leave at any time, as some do at the end of a stream."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        """GET /v1/models."""
        if self.path.rstrip("/") == "/v1/models":
            models = [{"id": self.model_name, "object": "model", "owned_by": "lab"}]
            self.send_document(200, {"object": "list", "data": models})
        else:
            self.send_problem(404, f"there is nothing at {self.path[:100]}")

    def do_POST(self) -> None:
        """POST to one of the paths."""
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_REQUEST_BYTES:
            self.close_connection = True
            self.send_problem(413, "send a content-length of at most 1 MiB")
            return
        raw = self.rfile.read(int(length))
        if self.path.rstrip("/") not in self.paths:
            self.send_problem(404, f"there is nothing at {self.path[:100]}")
            return
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self.send_problem(400, "the body is not a JSON object")
        elif body.get("stream") and not self.streams:
            self.send_problem(400, "the lab does not stream")
        else:
            self.answer(self.path.rstrip("/"), body)

    def send_problem(self, status: int, message: str) -> None:
        """Answer with an error in OpenAI's shape."""
        self.send_document(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def send_document(self, status: int, document: dict[str, Any]) -> None:
        """Answer with a JSON object."""
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_events(self, documents: Iterable[dict[str, Any]], *, typed: bool = False) -> None:
        """Answer with a stream of server-sent events, one for each JSON object, and the word that ends it.

        Typed ones bear the name of their type, as in Anthropic's streams, which end without such a word.
        """
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("cache-control", "no-cache")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for document in documents:
            self._send_event(json.dumps(document), f"event: {document['type']}\n" if typed else "")
        if not typed:
            self._send_event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _send_event(self, data: str, name: str = "") -> None:
        event = f"{name}data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
