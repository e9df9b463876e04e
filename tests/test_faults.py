"""Whatever goes wrong on the endpoint's side: an exit code, a kept run, a named fault, and never an accusation."""

import asyncio
import gc
import json
import math
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Ended, Weighbridge
from fault_server import (
    MEBIBYTE,
    MODEL,
    Answer,
    Call,
    FaultServer,
    body_without_end,
    broken_gzip,
    completion,
    cut_short,
    dropped_connection,
    empty_choices,
    end_of_turn,
    entry,
    error_in_200,
    first,
    gzip_bomb,
    html,
    huge_integer_logprob,
    large_body,
    nan_logprobs,
    not_http,
    not_utf8,
    nothing,
    null_logprobs,
    positive_logprobs,
    probabilities_sum_to_two,
    redirect_to,
    refuses,
    says,
    silence,
    steady_top,
    truncated_json,
    unasked_encoding,
    well_formed,
)

CONSISTENT, DIFFERS, CONFIGURATION, INCONCLUSIVE, UNREACHABLE, BUDGET = range(6)
REPORTS = ("report.html", "report.json", "junit.xml")
CAPABILITY_CALLS = 2  # of an endpoint that returns logprobs
MOST_KEPT_BYTES = 64 * 1024
MOST_MEMORY_BYTES = 64 * MEBIBYTE


@pytest.fixture(autouse=True)
def short_waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up host does not draw from its lists, so nothing is asked of its sampling; another process plans as it likes."""
    if "killed" not in request.node.name:
        request.getfixturevalue("weights_only")
    monkeypatch.setattr("weighbridge.collect.FIRST_WAIT_S", 0.001)


@pytest.fixture
def audit(weighbridge_cli: Weighbridge, reference: str, tmp_path: Path) -> Callable[..., Ended]:
    """`weighbridge audit` of a base URL; `limits` go into an ENDPOINT.toml."""

    def run(base_url: str, *options: object, **limits: float) -> Ended:
        file = tmp_path / "ENDPOINT.toml"
        lines = [f'name = "faulty"\nbase_url = "{base_url}"\nmodel = "{MODEL}"\nreference = "{reference}"\n[limits]']
        lines += [f"{name} = {value}" for name, value in ({"max_requests": 30} | limits).items()]
        file.write_text("\n".join(lines), "utf-8")
        return weighbridge_cli("audit", file, "--seed", "faults", "--out", tmp_path / "run", *options)

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "exchanges.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["event"] == kind]


def stopped_because(run: Path) -> str:
    return str(events(run, "stopped")[-1]["because"])


def verdict_of(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "verdict.json").read_bytes())
    return value


def assert_nobody_is_accused(ended: Ended, run: Path) -> None:
    """No verdict against the endpoint, no axis against it, and everything that is known is kept."""
    assert "Traceback" not in ended.err, ended.err
    verdict = verdict_of(run)
    assert verdict["verdict"] in ("consistent", "inconclusive")
    assert "inconsistent" not in verdict["axes"].values()
    assert events(run, "sent"), "what was sent is kept"
    assert [name for name in REPORTS if not (run / name).is_file()] == []


def assert_fault(ended: Ended, run: Path, code: int, named: str) -> None:
    assert_nobody_is_accused(ended, run)
    assert named.casefold() in ended.said.casefold()
    assert ended.code == code


# -- no connection ---------------------------------------------------------------------------------------------


def test_unknown_host_ends_unreachable(audit: Callable[..., Ended], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unknown(host: Any, *_: object, **__: object) -> Any:
        asked.append(host.decode() if isinstance(host, bytes) else host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert_fault(audit("https://no-such-host.invalid/v1"), run, UNREACHABLE, "host name is not known")
    assert asked == ["no-such-host.invalid"], "asked once: a host that is not known stays unknown"


def test_refused_connection_ends_unreachable(audit: Callable[..., Ended], run: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening
        ended = audit(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1")
    assert_fault(ended, run, UNREACHABLE, "connection was refused")


def test_plain_http_behind_https_ends_unreachable(audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(well_formed) as server:
        ended = audit(f"https://127.0.0.1:{server.port}/v1")
    assert_fault(ended, run, UNREACHABLE, "TLS connection failed")


# -- the same fault from the first request on ------------------------------------------------------------------

LIST_WITHOUT_NUMBERS = [entry("a", None)] * 20

FROM_THE_START: dict[str, tuple[Answer, int, str]] = {
    "401": (refuses(401, "no such key"), UNREACHABLE, "http_401: no such key"),
    "402": (refuses(402, "no credit"), UNREACHABLE, "http_402: no credit"),
    "403": (refuses(403, "not here"), UNREACHABLE, "http_403: not here"),
    "404 model": (refuses(404, "the model does not exist"), UNREACHABLE, "http_404: the model does not exist"),
    "429": (refuses(429, "too fast"), UNREACHABLE, "http_429: too fast"),
    "500": (refuses(500, "out of order"), UNREACHABLE, "http_500: out of order"),
    "503": (refuses(503, "busy"), UNREACHABLE, "http_503: busy"),
    "error object in a 200": (error_in_200, UNREACHABLE, "error_object: upstream is asleep"),
    "html": (html, UNREACHABLE, "html: the answer begins '<!doctype html>"),
    "truncated json": (truncated_json, UNREACHABLE, "truncated_json"),
    "not utf-8": (not_utf8, UNREACHABLE, "not_json"),
    "empty body": (nothing, UNREACHABLE, "not_json"),
    "json that is no object": (says([1]), UNREACHABLE, "not a JSON object"),
    "json nested without end": (lambda call: call.send(200, b"[" * 200_000), UNREACHABLE, "truncated_json"),
    "empty choices": (empty_choices, UNREACHABLE, "the answer has no choices"),
    "204": (lambda call: call.start(204, {}), UNREACHABLE, "http_204"),
    "unknown status": (lambda call: call.send(799, b"{}"), UNREACHABLE, "http_799"),
    "broken gzip": (broken_gzip, UNREACHABLE, "cannot be decompressed"),
    "unasked encoding": (unasked_encoding, UNREACHABLE, "encoded as 'br'"),
    "dropped connection": (dropped_connection, UNREACHABLE, "the connection broke"),
    "cut short": (cut_short, UNREACHABLE, "the connection broke"),
    "not http": (not_http, UNREACHABLE, "the connection broke"),
    "null logprobs": (null_logprobs, INCONCLUSIVE, "one and the same text, whatever was asked"),
    "end of turn": (end_of_turn, INCONCLUSIVE, "0 answers with logprobs"),
    "nan logprobs": (nan_logprobs, INCONCLUSIVE, "a logprob is not a finite number"),
    "null as logprob": (says(completion(LIST_WITHOUT_NUMBERS)), INCONCLUSIVE, "a logprob is not a finite number"),
    "huge integer logprob": (huge_integer_logprob, INCONCLUSIVE, "a logprob is not a finite number"),
    "positive logprobs": (positive_logprobs, INCONCLUSIVE, "a logprob is positive"),
    "sum of two": (probabilities_sum_to_two, INCONCLUSIVE, "probabilities sum to more than 1"),
}


@pytest.mark.parametrize("fault", FROM_THE_START)
def test_fault_from_the_start(fault: str, audit: Callable[..., Ended], run: Path) -> None:
    answer, code, named = FROM_THE_START[fault]
    with FaultServer(answer) as server:
        ended = audit(server.base_url)
    assert_fault(ended, run, code, named)


@pytest.mark.parametrize("fault", ["nan logprobs", "positive logprobs", "sum of two", "huge integer logprob"])
def test_bad_logprobs_are_noted_for_each_answer(fault: str, audit: Callable[..., Ended], run: Path) -> None:
    answer, _, named = FROM_THE_START[fault]
    with FaultServer(answer) as server:
        ended = audit(server.base_url)
    assert_nobody_is_accused(ended, run)
    observed = [json.loads(line) for line in (run / "observations.jsonl").read_bytes().splitlines()]
    assert {(o["fault"], o["top"]) for o in observed} == {("bad_logprobs", None)}
    assert all(named.removeprefix("probabilities ") in o["fault_detail"] for o in observed)


def test_a_fault_can_be_replayed_to_the_same_verdict(
    audit: Callable[..., Ended], run: Path, weighbridge_cli: Weighbridge
) -> None:
    with FaultServer(refuses(401, "no such key")) as server:
        audit(server.base_url)
    before = {name: (run / name).read_bytes() for name in ("verdict.json", *REPORTS)}
    assert weighbridge_cli("replay", run).code == UNREACHABLE
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_refusal_is_asked_once_and_a_passing_fault_four_times(
    audit: Callable[..., Ended], run: Path, tmp_path: Path
) -> None:
    with FaultServer(refuses(401, "no")) as server:
        audit(server.base_url)
        assert len(server.requests) == 1
    run.rename(tmp_path / "first")
    with FaultServer(refuses(500, "no")) as server:
        audit(server.base_url)
        assert len(server.requests) == 4


def test_fail_on_never_does_not_hide_an_unreachable_endpoint(audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(refuses(500, "out of order")) as server:
        assert_fault(audit(server.base_url, "--fail-on", "never"), run, UNREACHABLE, "out of order")


def test_budget_spent_before_an_answer_has_its_own_code(audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(null_logprobs) as server:
        ended = audit(server.base_url, max_requests=3)
        assert len(server.requests) == 3
    assert_fault(ended, run, BUDGET, "budget requests")


def test_retries_count_against_the_budget(audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(refuses(500, "out of order")) as server:
        ended = audit(server.base_url, max_requests=2)
        assert len(server.requests) == 2
    assert_nobody_is_accused(ended, run)
    assert stopped_because(run) == "budget_requests"


# -- waits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that the collector asks for; none of them is waited out."""
    seen: list[float] = []
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def note(seconds: float, *_: object) -> None:
        seen.append(seconds)
        await sleep(0)

    monkeypatch.setattr("weighbridge.collect.asyncio.sleep", note)
    return seen


def in_a_minute() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)


def test_retry_after_in_seconds_is_honoured(audit: Callable[..., Ended], run: Path, waits: list[float]) -> None:
    with FaultServer(first(2, refuses(429, "too fast", retry_after="7"), refuses(401, "no"))) as server:
        ended = audit(server.base_url)
    assert_fault(ended, run, UNREACHABLE, "http_401")
    assert [wait for wait in waits if wait] == [7, 7]


def test_retry_after_as_a_date_is_honoured(audit: Callable[..., Ended], run: Path, waits: list[float]) -> None:
    with FaultServer(first(1, refuses(429, "too fast", retry_after=in_a_minute()), refuses(401, "no"))) as server:
        ended = audit(server.base_url)
    assert_fault(ended, run, UNREACHABLE, "http_401")
    assert [wait for wait in waits if wait] == [pytest.approx(60, abs=5)]


def test_without_retry_after_the_wait_doubles(audit: Callable[..., Ended], run: Path, waits: list[float]) -> None:
    with FaultServer(refuses(429, "too fast")) as server:
        assert_fault(audit(server.base_url), run, UNREACHABLE, "http_429")
    backoff = [wait / 0.001 for wait in waits if wait]
    assert len(backoff) == 3
    assert all(2**n <= wait <= 1.5 * 2**n for n, wait in enumerate(backoff))


@pytest.mark.parametrize("asked", ["soon", "-5", "1.5", "", "Thu, 01 Jan 1970 00:00:00 GMT", "²", "Mon, 99 Foo 2020"])
def test_retry_after_without_meaning_is_no_reason_to_fail(
    asked: str, audit: Callable[..., Ended], run: Path, waits: list[float]
) -> None:
    with FaultServer(refuses(429, "too fast", retry_after=asked)) as server:
        assert_fault(audit(server.base_url), run, UNREACHABLE, "http_429")
    assert max(waits) <= 90


@pytest.mark.parametrize(
    "asked",
    ["Thu, 01 Jan 99999999999999999999 00:00:00 GMT", f"Thu, 01 Jan 2026 00:00:00 +{'9' * 30}"],
    ids=["year", "time zone"],
)
def test_retry_after_out_of_all_bounds_is_no_reason_to_fail(
    asked: str, audit: Callable[..., Ended], run: Path, waits: list[float]
) -> None:
    with FaultServer(refuses(429, "too fast", retry_after=asked)) as server:
        assert_fault(audit(server.base_url), run, UNREACHABLE, "http_429")


@pytest.mark.parametrize("asked", ["100000", "9" * 400], ids=["a day", "for ever"])
def test_a_wait_without_measure_stops_the_run(
    asked: str, audit: Callable[..., Ended], run: Path, waits: list[float]
) -> None:
    with FaultServer(refuses(429, "too fast", retry_after=asked)) as server:
        ended = audit(server.base_url)
        assert len(server.requests) == 1
    assert_fault(ended, run, UNREACHABLE, "rate limited")
    assert stopped_because(run) == "rate_limited"
    assert not any(waits)


def test_a_rate_limited_run_can_be_resumed(
    audit: Callable[..., Ended], run: Path, weighbridge_cli: Weighbridge
) -> None:
    limited = first(3, well_formed, refuses(429, "too fast", retry_after="100000"))
    with FaultServer(first(4, limited, refuses(401, "the key is gone"))) as server:
        assert_fault(audit(server.base_url), run, UNREACHABLE, "rate limited")
        ended = weighbridge_cli("resume", run)
        prompts = [request.prompt for request in server.requests]
    assert_nobody_is_accused(ended, run)
    assert ended.code == UNREACHABLE
    assert len(prompts) == 5
    assert prompts[4] == prompts[3], "the request that was not answered is asked again"


@pytest.mark.parametrize("concurrency", [4, 16])
def test_many_waits_at_once_stop_the_run_quietly(
    concurrency: int, audit: Callable[..., Ended], run: Path, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    limited = refuses(429, "too fast", retry_after="100000")
    with FaultServer(first(CAPABILITY_CALLS, well_formed, limited)) as server:
        ended = audit(server.base_url, concurrency=concurrency, max_requests=60)
    gc.collect()
    assert_fault(ended, run, UNREACHABLE, "rate limited")
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


# -- sizes and times -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [large_body, gzip_bomb])
def test_a_body_without_measure_is_cut(fault: Answer, audit: Callable[..., Ended], run: Path) -> None:
    peaks = []
    # What the reference takes is taken either way.
    for answer in (refuses(401, "no"), fault):
        shutil.rmtree(run, ignore_errors=True)
        with FaultServer(answer) as server:
            tracemalloc.start()
            try:
                ended = audit(server.base_url)
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
            assert len(server.requests) == 1
    assert_fault(ended, run, UNREACHABLE, "larger than 8 MiB")
    assert server.bytes_sent < 64 * MEBIBYTE
    assert peaks[1] - peaks[0] < MOST_MEMORY_BYTES
    assert (run / "exchanges.jsonl").stat().st_size < MOST_KEPT_BYTES


@pytest.mark.parametrize("fault", [body_without_end, silence])
def test_an_answer_that_never_ends_times_out(fault: Answer, audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(fault) as server:
        ended = audit(server.base_url, timeout_s=0.15)
        assert len(server.requests) == 4
    assert_fault(ended, run, UNREACHABLE, "no complete answer within 0.15 s")


def test_headers_without_measure_are_no_reason_to_fail(audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(refuses(401, "no", **{f"x_{n}": "y" * 4000 for n in range(50)})) as server:
        ended = audit(server.base_url)
    assert_nobody_is_accused(ended, run)
    assert ended.code == UNREACHABLE
    assert (run / "exchanges.jsonl").stat().st_size < MOST_KEPT_BYTES


# -- redirects -------------------------------------------------------------------------------------------------


def test_a_redirect_is_named_and_never_followed(audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(well_formed) as elsewhere, FaultServer(redirect_to(f"{elsewhere.base_url}/x")) as server:
        ended = audit(server.base_url)
        assert elsewhere.requests == []
        assert len(server.requests) == 1
    assert_fault(ended, run, UNREACHABLE, "redirects are never followed")


@pytest.mark.parametrize("where", ["", "http://[", "javascript:alert(1)", "//x\x1b[31m", "http://\xff"])
def test_a_redirect_to_nowhere_is_no_reason_to_fail(where: str, audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(redirect_to(where)) as server:
        ended = audit(server.base_url)
    assert_fault(ended, run, UNREACHABLE, "redirects are never followed")
    assert "\x1b" not in ended.out + ended.err


def test_control_characters_never_reach_the_terminal(audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(refuses(401, "no\x1b[2J\x07 [bold red]key[/bold red] \u202egnp")) as server:
        ended = audit(server.base_url)
    assert_fault(ended, run, UNREACHABLE, "[bold red]key[/bold red]")
    assert not {"\x1b", "\x07", "\u202e"} & set(ended.out + ended.err)


# -- good answers first ----------------------------------------------------------------------------------------

LATE: dict[str, tuple[Answer, str]] = {
    "500": (refuses(500, "out of order"), "out of order"),
    "401": (refuses(401, "the key is gone"), "the key is gone"),
    "429": (refuses(429, "too fast"), "too fast"),
    "html": (html, "the answer begins '<!doctype html>"),
    "dropped connection": (dropped_connection, "the connection broke"),
    "error object": (error_in_200, "upstream is asleep"),
    "redirect": (redirect_to("https://elsewhere.example/"), "redirects to https://elsewhere.example/"),
}


@pytest.mark.parametrize("fault", LATE)
@pytest.mark.parametrize("good_probes", [0, 2])
def test_fault_after_good_answers(good_probes: int, fault: str, audit: Callable[..., Ended], run: Path) -> None:
    answer, _ = LATE[fault]
    with FaultServer(first(CAPABILITY_CALLS + good_probes, well_formed, answer)) as server:
        ended = audit(server.base_url)
        asked = len(server.requests)
    assert_nobody_is_accused(ended, run)
    assert ended.code == UNREACHABLE
    good = [line for line in events(run, "received") if line.get("status") == 200 and "logprob" in line["body_text"]]
    assert len(good) == CAPABILITY_CALLS + good_probes, "what was collected is kept"
    assert len(events(run, "sent")) == len(events(run, "received")) == asked == verdict_of(run)["requests_sent"]


@pytest.mark.parametrize("fault", LATE)
def test_fault_after_good_answers_is_named(fault: str, audit: Callable[..., Ended], run: Path) -> None:
    answer, named = LATE[fault]
    with FaultServer(first(CAPABILITY_CALLS, well_formed, answer)) as server:
        assert_fault(audit(server.base_url), run, UNREACHABLE, named)


def test_a_single_failure_among_good_answers_is_passed_over(audit: Callable[..., Ended], run: Path) -> None:
    """One probe is refused four times, the next one is answered."""
    faulty = first(CAPABILITY_CALLS + 4, refuses(500, "hiccup"), well_formed)
    with FaultServer(first(CAPABILITY_CALLS, well_formed, faulty)) as server:
        ended = audit(server.base_url, max_requests=CAPABILITY_CALLS + 4 + 2)
    assert_nobody_is_accused(ended, run)
    assert ended.code == BUDGET
    assert verdict_of(run)["answers_used"] == 2


@pytest.mark.parametrize("concurrency", [2, 8])
def test_faults_of_several_requests_at_once_stop_the_run(
    concurrency: int, audit: Callable[..., Ended], run: Path
) -> None:
    with FaultServer(first(CAPABILITY_CALLS, well_formed, html)) as server:
        ended = audit(server.base_url, concurrency=concurrency, max_requests=100)
        assert len(server.requests) <= CAPABILITY_CALLS + 3 * concurrency
    assert_nobody_is_accused(ended, run)
    assert ended.code == UNREACHABLE


# -- answers that look well formed and cannot be judged --------------------------------------------------------


def short_list(call: Call) -> None:
    call.send_json(200, completion(steady_top(2)))


def improbable_strangers(call: Call) -> None:
    """Tokens of another alphabet, all of them nearly impossible."""
    call.send_json(200, completion([entry(chr(0x10400 + n), -60.0 - n) for n in range(20)]))


def sentinels_only(call: Call) -> None:
    call.send_json(200, completion([entry(chr(ord("a") + n), -9999.0) for n in range(20)]))


@pytest.mark.parametrize("fault", [short_list, improbable_strangers, sentinels_only])
def test_lists_that_cannot_be_compared_are_inconclusive(fault: Answer, audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(first(CAPABILITY_CALLS, well_formed, fault)) as server:
        ended = audit(server.base_url, max_requests=CAPABILITY_CALLS + 12)
    assert_nobody_is_accused(ended, run)
    assert ended.code == INCONCLUSIVE


def wild_counts(call: Call) -> None:
    call.send_json(200, completion(None, prompt_tokens=(call.request.number % 2) * 999_999_999))


def test_wild_token_counts_take_no_memory(
    audit: Callable[..., Ended], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = np.bincount

    def bounded(values: Any, *rest: Any, **more: Any) -> Any:
        assert np.max(values) < 10**7, f"would take {8 * int(np.max(values)) / 2**30:.0f} GiB"
        return count(values, *rest, **more)

    monkeypatch.setattr(np, "bincount", bounded)
    with FaultServer(wild_counts) as server:
        ended = audit(server.base_url)
    assert_nobody_is_accused(ended, run)
    assert ended.code == INCONCLUSIVE


@pytest.mark.parametrize("counts", [None, "many", -1, True, 1e300, math.nan, 10**400], ids=lambda value: str(value)[:8])
def test_token_counts_that_are_none_are_left_out(counts: object, audit: Callable[..., Ended], run: Path) -> None:
    with FaultServer(says(completion(None, prompt_tokens=counts))) as server:
        ended = audit(server.base_url)
    assert_fault(ended, run, INCONCLUSIVE, "0 token counts")
    assert verdict_of(run)["prompt_tokens"] == 0


# -- crash and resume ------------------------------------------------------------------------------------------


def test_resume_asks_only_what_was_not_answered(
    audit: Callable[..., Ended], run: Path, weighbridge_cli: Weighbridge
) -> None:
    with FaultServer(first(CAPABILITY_CALLS + 1, well_formed, dropped_connection)) as server:
        assert audit(server.base_url).code == UNREACHABLE
        before = len(server.requests)
        answered = {request.prompt for request in server.requests[:3]}
        kept = (run / "exchanges.jsonl").read_bytes()
        server.answer = well_formed
        ended = weighbridge_cli("resume", run, "--max-requests", before + 1)
        again = [request.prompt for request in server.requests[before:]]
    assert_nobody_is_accused(ended, run)
    assert ended.code == BUDGET
    assert (run / "exchanges.jsonl").read_bytes().startswith(kept), "what was collected is kept"
    assert len(again) == 1
    assert not answered & set(again)
    assert verdict_of(run)["answers_used"] == 2  # a third made-up answer would differ


def test_resume_after_a_kill_asks_the_request_that_was_under_way(
    audit: Callable[..., Ended], run: Path, weighbridge_cli: Weighbridge
) -> None:
    with FaultServer(first(3, well_formed, refuses(401, "gone"))) as server:
        audit(server.base_url)
        cut_off = server.requests[3].prompt
        log = run / "exchanges.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:7]) + lines[7][:20])  # sent, and a torn line
        server.requests.clear()
        server.answer = refuses(401, "gone for good")
        ended = weighbridge_cli("resume", run)
        assert [request.prompt for request in server.requests] == [cut_off]
    assert_nobody_is_accused(ended, run)
    assert ended.code == UNREACHABLE
    attempts = Counter(line["request_id"] for line in events(run, "sent"))
    assert sorted(attempts.values()) == [1, 1, 1, 2]


def test_every_request_has_a_seed_of_its_own(audit: Callable[..., Ended], run: Path) -> None:
    """Under one seed a server takes the same random number each time, and what it draws is no longer independent."""
    with FaultServer(first(20, well_formed, refuses(401, "enough"))) as server:
        audit(server.base_url)
    asked = [line for line in events(run, "sent") if not line["request_id"].startswith("sampling-")]
    seeds = {line["request_id"]: line["body"]["seed"] for line in asked if line.get("method", "POST") == "POST"}
    assert len(set(seeds.values())) == len(seeds) >= 10


def test_a_killed_audit_can_be_judged_and_resumed(run: Path, reference: str, weighbridge_cli: Weighbridge) -> None:
    """The process is killed outright while an answer is under way."""
    started = [False]

    def hang(call: Call) -> None:
        started[0] = True
        silence(call)

    with FaultServer(first(3, well_formed, hang)) as server:
        arguments = [
            "audit", "--base-url", server.base_url, "--model", MODEL, "--reference", reference, "--out", str(run),
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", "from weighbridge.cli import main; main()", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not started[0] and process.poll() is None:
            server.stopping.wait(0.02)
        process.kill()
        process.wait()
        assert started[0]
        judged = weighbridge_cli("replay", run)
        assert_nobody_is_accused(judged, run)
        assert judged.code == INCONCLUSIVE
        server.answer = refuses(404, "the model is gone")
        before = len(server.requests)
        ended = weighbridge_cli("resume", run)
        asked = [r.prompt for r in server.requests[before:]]
        assert asked[0] == server.requests[before - 1].prompt, "what was under way is asked again"
        assert len(asked) == len(set(asked)) == 3, "one missing answer may be the probe's; three are the endpoint's"
    assert_fault(ended, run, UNREACHABLE, "the model is gone")


def test_the_folder_is_named_whole_so_that_it_can_be_copied(
    weighbridge_cli: Weighbridge, tmp_path: Path, reference: str
) -> None:
    folder = tmp_path / ("a-rather-long-name-for-a-run-folder-" * 3)
    with FaultServer(refuses(401, "no")) as server:
        arguments = ["--base-url", server.base_url, "--model", MODEL, "--reference", reference, "--out", folder]
        ended = weighbridge_cli("audit", *arguments)
    assert f"{folder}/report.html" in ended.out
    assert str(folder) in ended.err
