"""A host of many names on one loopback port, which replays what real endpoints answered, with faults mixed in.

Every request that an audit may send is asked once of the lab's variants and kept under .benchmarks-cache/replayed/. The server looks a
request up by its conversation and settings and gives the very bytes back. A name's number says how it behaves: see `behaviour`.
"""

import argparse
import asyncio
import json
import re
import sys
from collections import Counter
from typing import Any

from figures import CACHE, say
from weighbridge.audit import collect_run
from weighbridge.judge.policy import load_policy
from weighbridge.lab.front import MODEL_NAME, Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS
from weighbridge.plan import make_plan
from weighbridge.records import Endpoint, Exchange, Limits
from weighbridge.reference.bundle import load_bundle
from weighbridge.store import RunFolder

REPLAYED = ("f16", "bf16-busy", "q8_0", "q4_0", "hidden-system", "depth-24")
# Of twenty names that are numbered in a row.
FAULTS = {3: "429", 5: "500", 7: "dead", 11: "hangs", 13: "slow", 17: "broken"}
SLOW_S = 0.5
_NONCE = re.compile(r"\([0-9a-f]{16}\)$")
_OWN_SEEDS = 1000  # seeds below it are the request's own; others are made from the run
_LEFT_OUT = ("model", "stream_options", "user")


def behaviour(number: int) -> str:
    """How the endpoint of a number behaves: ``well``, or one of the faults."""
    return FAULTS.get(number % 20, "well")


def variant_of(number: int) -> str:
    """What it serves: mostly honest weights, which is what a fleet is."""
    return REPLAYED[number % 10 - 4] if number % 10 in (6, 7, 8, 9) else REPLAYED[number % 2]


def collected(variant: str) -> list[Exchange]:
    """Every request that an audit may send, asked once of a variant, and its answers."""
    folder = RunFolder(CACHE / "replayed" / variant)
    bundle = load_bundle("smollm2-135m-instruct")
    if not (folder.path / "plan.json").exists():
        never = load_policy("strict").model_copy(update={"min_answers": 10_000, "min_answers_consistent": 10_000})
        limits = Limits(max_requests=1000, timeout_s=600)
        endpoint = Endpoint(name=variant, base_url="http://127.0.0.1:1/v1", model=MODEL_NAME, limits=limits)
        RunFolder.create(folder.path, make_plan(endpoint, never, bundle, seed="replayed"))
    plan = folder.plan()
    if folder.exchanges()[1] is None:
        with lab_endpoint(VARIANTS[variant], Lies(), say) as front:
            say(f"collecting {variant}")
            there = plan.endpoint.model_copy(update={"base_url": front.base_url})
            collect_run(folder, plan, there, bundle, None, lambda _: None)
    return folder.exchanges()[0]


def key_of(body: dict[str, Any]) -> str:
    """What a request is looked up by: all that matters to the answer, without what is another in each run."""
    kept = {name: value for name, value in body.items() if name not in _LEFT_OUT}
    if isinstance(kept.get("seed"), int) and kept["seed"] >= _OWN_SEEDS:
        del kept["seed"]
    kept["messages"] = [[m["role"], _NONCE.sub("", m["content"])] for m in body.get("messages", [])]
    return json.dumps(kept, sort_keys=True)


class Host:
    """The server: what is known by key, and how often each name was asked and answered."""

    def __init__(self, delay_s: float) -> None:
        self.answers = {
            name: {
                key_of(e.sent.body): (e.received.body_text or "").encode() for e in collected(name) if e.received.status == 200 and e.sent.body
            }
            for name in REPLAYED
        }  # fmt: skip
        self.asked: Counter[int] = Counter()
        self.answered: Counter[int] = Counter()
        self.unknown = 0
        self.delay_s = delay_s

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it is closed."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                await self.answer(head.split(" ")[1], json.loads(body) if body else None, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, body: dict[str, Any] | None, writer: asyncio.StreamWriter) -> None:
        """Answer one request as its name behaves."""
        if path == "/stats":
            stats = {"asked": self.asked, "answered": self.answered, "unknown": self.unknown}
            return await self.send(writer, 200, json.dumps(stats).encode())
        number = int(path.split("/")[2])
        if body is None:
            return await self.send(writer, 200, json.dumps({"data": [{"id": MODEL_NAME}]}).encode())
        self.asked[number] += 1
        manner, turn = behaviour(number), self.asked[number]
        await asyncio.sleep(SLOW_S if manner == "slow" else self.delay_s)
        if manner == "hangs":
            await asyncio.sleep(3600)
        if manner == "429" and turn % 10 == 4:
            return await self.send(writer, 429, b'{"error": {"message": "slow down"}}', "retry-after: 1\r\n")
        if manner == "500" and turn % 15 == 4:
            return await self.send(writer, 500, b"oops")
        if manner == "broken":
            return await self.send(writer, 200, b'{"choices": [')
        found = self.answers[variant_of(number)].get(key_of(body)) if path.endswith("/chat/completions") else None
        if found is None:
            self.unknown += path.endswith("/chat/completions")
            return await self.send(writer, 404, b'{"error": {"message": "there is no such thing"}}')
        await self.send(writer, 200, found, kind="text/event-stream" if body.get("stream") else "application/json")
        self.answered[number] += 1
        return None

    async def send(
        self, writer: asyncio.StreamWriter, status: int, body: bytes, headers: str = "", kind: str = "application/json"
    ) -> None:
        """Write one answer."""
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode()
            + body
        )
        await writer.drain()


async def _serve(delay_s: float) -> None:
    host = Host(delay_s)
    server = await asyncio.start_server(host.connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", action="store_true", help="only collect what is replayed")
    parser.add_argument("--delay-s", type=float, default=0.02)
    arguments = parser.parse_args()
    if arguments.collect:
        sys.exit(print({name: len(collected(name)) for name in REPLAYED}))
    asyncio.run(_serve(arguments.delay_s))
