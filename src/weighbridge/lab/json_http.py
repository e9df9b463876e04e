"""What the lab's HTTP hosts share: JSON in, JSON out, with the standard library alone."""

import json
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar

MAX_REQUEST_BYTES = 1 << 20


class JsonHandler(BaseHTTPRequestHandler):
    """A request handler that speaks JSON and keeps quiet.

    Attributes
    ----------
    model_name : str
        What GET /v1/models lists.
    paths : tuple of str
        Where something can be posted.
    """

    model_name: ClassVar[str]
    paths: ClassVar[tuple[str, ...]]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, path: str, body: dict[str, Any]) -> None:
        """Answer what was posted to one of the paths."""
        raise NotImplementedError

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
        elif body.get("stream"):
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
