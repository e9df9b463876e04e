"""An audit that is killed at any moment goes on, and nothing that came back is asked again."""

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from weighbridge.lab.front import MODEL_NAME, Front, Lies
from weighbridge.lab.provider import lab_backend
from weighbridge.lab.variants import VARIANTS
from weighbridge.store import RunFolder

pytestmark = pytest.mark.lab
CLI = [sys.executable, "-c", "from weighbridge.cli import main; main()"]


class CountingProxy:
    """Passes requests on to a front and counts how often each body arrived and was answered."""

    def __init__(self, front: Front) -> None:
        self.arrived: Counter[str] = Counter()
        port = int(front.base_url.split(":")[2].split("/")[0])
        counter = self.arrived

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                counter[body.decode()] += 1
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("POST", self.path, body, {"content-type": "application/json"})
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                self.send_response(answer.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                try:
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "CountingProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with lab_backend(VARIANTS["bf16"], lambda _: None) as server, Front(server.port, Lies()) as running:
        yield running


def endpoint_file(folder: Path, base_url: str) -> Path:
    """An endpoint with a sampling seed of its own: a run's seed comes from its id, and which token is drawn may end the turn."""
    path = folder / f"{base_url.rsplit(':', 1)[1].split('/')[0]}.toml"
    path.write_text(
        f'name = "{MODEL_NAME}"\nbase_url = "{base_url}"\nmodel = "{MODEL_NAME}"\nreference = "smollm2-135m-instruct"\n'
        "extra_body = { seed = 11 }\n"
    )
    return path


def test_killed_audits_go_on_and_ask_nothing_twice(front: Front, tmp_path: Path) -> None:
    moments = random.Random(20261122)
    run = tmp_path / "run"
    environment = {**os.environ, "WEIGHBRIDGE_HOME": str(tmp_path / "home")}
    with CountingProxy(front) as proxy:
        command = [
            *CLI, "audit", str(endpoint_file(tmp_path, proxy.url)), "--seed", "killed", "--max-requests", "90", "--out", str(run),
        ]  # fmt: skip
        kills = 0
        for _ in range(6):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            already = sum(proxy.arrived.values())
            # Wait until it has sent something, then kill it somewhere in the next few requests.
            while sum(proxy.arrived.values()) == already and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.6))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
            command = [*CLI, "resume", str(run)]
        last = subprocess.run([*CLI, "resume", str(run)], env=environment, capture_output=True, text=True, check=False)
        assert last.returncode == 0, last.stderr
        assert kills >= 3
        exchanges, stopped = RunFolder(run).exchanges()
        # A refusal is an answer too: one slot gives no second choice.
        answered = Counter(json.dumps(e.sent.body, sort_keys=True) for e in exchanges if e.received.status is not None)
        by_request = Counter(e.sent.request_id for e in exchanges if e.received.status == 200)
        interrupted = Counter(
            json.dumps(e.sent.body, sort_keys=True) for e in exchanges if e.received.failure == "interrupted"
        )
        arrived = Counter({json.dumps(json.loads(body), sort_keys=True): n for body, n in proxy.arrived.items()})
    assert stopped is not None
    assert stopped.because == "decided"
    # Two requests are alike on purpose: they ask whether a seed gives the same text again.
    assert max(by_request.values()) == 1
    assert sum(interrupted.values()) <= kills
    for body, times in arrived.items():
        # Each arrival is an answer that was kept, or an attempt that a kill cut off and the log knows of.
        assert times <= answered[body] + interrupted[body]
    uninterrupted = tmp_path / "uninterrupted"
    whole = subprocess.run(
        [*CLI, "audit", str(endpoint_file(tmp_path, front.base_url)), "--seed", "killed", "--max-requests", "90", "--out", str(uninterrupted)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert whole.returncode == 0
    one, other = (json.loads((folder / "findings.json").read_bytes())["findings"] for folder in (run, uninterrupted))
    assert [f["outcome"] for f in one] == [f["outcome"] for f in other]
    # Times differ, the proxy offers no listing, and the text after a word that nobody has seen is another one.
    for check in ("prompt", "weights", "share"):
        assert [f for f in one if f["check"] == check] == [f for f in other if f["check"] == check]
