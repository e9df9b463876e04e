"""The run folder: nothing that came back is lost, and the same contents are the same bytes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge import store
from weighbridge.canonical import canonical_bytes, rounded, write_atomically
from weighbridge.errors import RunFolderError
from weighbridge.judge.policy import load_policy
from weighbridge.keys import owner_mark
from weighbridge.plan import make_plan
from weighbridge.records import (
    AXES,
    Capability,
    Effect,
    Endpoint,
    Exchange,
    FailureCode,
    Finding,
    Findings,
    Observation,
    Plan,
    Received,
    Sent,
    TopToken,
    Verdict,
)
from weighbridge.store import ExchangeLog, RunFolder, Stopped, plan_bytes

few = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of its own for every test."""
    monkeypatch.setenv("WEIGHBRIDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def small_plan(name: str = "an endpoint") -> Plan:
    endpoint = Endpoint(name=name, base_url="https://api.example.com/v1", model="some-model")
    return make_plan(endpoint, load_policy("strict"), None, seed="seed", created_at="2026-01-01T00:00:00+00:00")


def small_folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", small_plan())


def sent(name: str, attempt: int = 1, **body: Any) -> Sent:
    return Sent(request_id=name, attempt=attempt, sent_at="2026-01-01T00:00:00Z", body=body or {"model": "m"})


def received(name: str, attempt: int = 1, **more: Any) -> Received:
    facts: dict[str, Any] = {"status": 200, "headers": {"server": "é"}, "body_text": '{"a": "é\u2028"}'} | more
    return Received(request_id=name, attempt=attempt, latency_s=0.125, **facts)


def exchanged(log: ExchangeLog, *names: str) -> None:
    for name in names:
        log.append(sent(name))
        log.append(received(name))


def names(exchanges: list[Exchange]) -> list[str]:
    return [exchange.sent.request_id for exchange in exchanges]


# -- exchanges -------------------------------------------------------------------------------------------------


def test_a_run_without_exchanges_is_empty(tmp_path: Path) -> None:
    assert small_folder(tmp_path).exchanges() == ([], None)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    first, second = sent("a", model="é", stop=None), sent("a", 2, deep={"x": [None, 1.5]})
    answers = received("a", status=503, first_byte_s=0.1), received("a", 2, body_text=None, body_base64="/w==")
    with folder.log() as log:
        for record in (first, answers[0], second, answers[1]):
            log.append(record)
        log.append(Stopped(because="decided"))
    exchanges, stopped = folder.exchanges()
    assert exchanges == [Exchange(sent=first, received=answers[0]), Exchange(sent=second, received=answers[1])]
    assert stopped == Stopped(because="decided")


@pytest.mark.parametrize("failure", ["unknown_host", "refused", "tls", "timeout", "connection_lost"])
def test_an_attempt_without_a_status_is_read_back(tmp_path: Path, failure: FailureCode) -> None:
    folder = small_folder(tmp_path)
    failed = received("a", status=None, headers={}, body_text=None, failure=failure, failure_detail="why")
    with folder.log() as log:
        log.append(sent("a"))
        log.append(failed)
    assert folder.exchanges() == ([Exchange(sent=sent("a"), received=failed)], None)


def test_exchanges_come_in_the_order_of_sending(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    with folder.log() as log:
        for record in (sent("a"), sent("b"), received("b"), received("a")):
            log.append(record)
    exchanges, _ = folder.exchanges()
    assert names(exchanges) == ["a", "b"]
    assert [exchange.received.request_id for exchange in exchanges] == ["a", "b"]


def test_an_attempt_without_an_answer_was_interrupted(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    with folder.log() as log:
        exchanged(log, "a")
        log.append(sent("b"))
    exchanges, _ = folder.exchanges()
    assert names(exchanges) == ["a", "b"]
    assert exchanges[0].received.failure is None
    assert exchanges[1].received.failure == "interrupted"
    assert exchanges[1].received.status is None


def test_a_run_that_goes_on_is_not_stopped(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    with folder.log() as log:
        log.append(Stopped(because="budget_requests"))
        exchanged(log, "a")
    assert folder.exchanges()[1] is None


def test_every_line_is_on_the_disk_before_the_next_step(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    with folder.log() as log:
        log.append(sent("a"))
        assert names(folder.exchanges()[0]) == ["a"]


def whole_and_last_line(tmp_path: Path) -> tuple[RunFolder, bytes, bytes]:
    folder = small_folder(tmp_path)
    with folder.log() as log:
        exchanged(log, "a", "b")
    data = (folder.path / "exchanges.jsonl").read_bytes()
    cut = data.rindex(b"\n", 0, -1) + 1
    return folder, data[:cut], data[cut:]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_torn_last_line_is_cut_and_everything_before_is_kept(tmp_path: Path, share: float) -> None:
    folder, whole, last = whole_and_last_line(tmp_path)
    file = folder.path / "exchanges.jsonl"
    file.write_bytes(whole + last[: int(share * len(last))])
    before, _ = folder.exchanges()
    assert [exchange.received.failure for exchange in before] == [None, "interrupted"]
    with folder.log() as log:
        assert file.read_bytes() == whole
        exchanged(log, "c")
    after, _ = folder.exchanges()
    assert names(after) == ["a", "b", "c"]
    assert after[:2] == before


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    (folder.path / "exchanges.jsonl").write_bytes(b'{"event": "se')
    with folder.log() as log:
        exchanged(log, "a")
    assert names(folder.exchanges()[0]) == ["a"]


def test_whole_lines_are_left_alone(tmp_path: Path) -> None:
    folder, whole, last = whole_and_last_line(tmp_path)
    with folder.log():
        pass
    assert (folder.path / "exchanges.jsonl").read_bytes() == whole + last


def test_a_torn_line_is_cut_however_long_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of 8 MiB of control characters is a line of 48 MiB: more than the tail that is searched."""
    monkeypatch.setattr(store, "_BLOCK_BYTES", 64)
    folder, whole, last = whole_and_last_line(tmp_path)
    (folder.path / "exchanges.jsonl").write_bytes(whole + last[:-1])
    with folder.log() as log:
        exchanged(log, "c")
    assert names(folder.exchanges()[0]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"7", b"null", b'{"event": "received"}', b'{"event": "else"}', b"\xff", b"[" * 100_000, b""],
    ids=["torn", "list", "number", "null", "no-fields", "unknown", "not-utf8", "deep", "empty"],
)
def test_a_whole_line_that_cannot_be_read_is_named(tmp_path: Path, line: bytes) -> None:
    folder, whole, last = whole_and_last_line(tmp_path)
    (folder.path / "exchanges.jsonl").write_bytes(whole + line + b"\n" + last)
    with pytest.raises(RunFolderError, match=r"exchanges\.jsonl, line 4 cannot be read"):
        folder.exchanges()


def test_a_second_log_on_one_folder_is_refused(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    with folder.log() as first:
        with pytest.raises(RunFolderError, match="another process"), folder.log():
            pass
        exchanged(first, "a")
    with folder.log() as second:
        exchanged(second, "b")
    assert names(folder.exchanges()[0]) == ["a", "b"]


def test_an_exception_inside_the_log_gives_the_folder_free(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)

    def interrupted() -> None:
        with folder.log() as log:
            log.append(sent("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with folder.log() as log:
        exchanged(log, "b")
    assert names(folder.exchanges()[0]) == ["a", "b"]


# -- plan and owner --------------------------------------------------------------------------------------------


def test_the_plan_is_read_back(tmp_path: Path) -> None:
    plan = small_plan()
    folder = RunFolder.create(tmp_path / "run", plan)
    assert folder.plan() == plan
    assert (folder.path / "plan.json").read_bytes() == plan_bytes(plan)


def test_create_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    before = (folder.path / "plan.json").read_bytes()
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.create(folder.path, small_plan("another"))
    assert (folder.path / "plan.json").read_bytes() == before


def test_create_uses_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("mine")
    assert small_folder(tmp_path).plan().endpoint.name == "an endpoint"


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no plan\.json"):
        RunFolder(tmp_path).plan()


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[]", b"{}", b"[" * 100_000])
def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = small_folder(tmp_path)
    (folder.path / "plan.json").write_bytes(data)
    with pytest.raises(RunFolderError):
        folder.plan()


def test_an_own_run_is_known(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    assert folder.is_own()


@pytest.mark.parametrize(
    ("old", "new"), [(b"api.example.com", b"api.example.org"), (b'"max_requests": 100', b'"max_requests": 101')]
)
def test_a_run_whose_plan_was_changed_is_not_own(tmp_path: Path, old: bytes, new: bytes) -> None:
    folder = small_folder(tmp_path)
    file = folder.path / "plan.json"
    data = file.read_bytes()
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))
    assert not folder.is_own()


def test_a_run_that_was_planned_before_a_field_was_added_is_own(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    file = folder.path / "plan.json"
    data = file.read_bytes()
    older = b"".join(line for line in data.splitlines(keepends=True) if b'"sealed"' not in line)
    assert older != data
    file.write_bytes(older)
    (folder.path / "owner").write_bytes(owner_mark(older).encode())
    assert folder.is_own()
    assert folder.plan() == Plan.model_validate_json(data)


def test_a_run_of_another_user_is_not_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_folder(tmp_path)
    monkeypatch.setenv("WEIGHBRIDGE_HOME", str(tmp_path / "other home"))
    assert not folder.is_own()


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def not_ascii(file: Path) -> None:
    file.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize("spoil", [remove, empty, not_ascii])
def test_a_run_without_its_mark_is_not_own(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = small_folder(tmp_path)
    spoil(folder.path / "owner")
    assert not folder.is_own()


def test_a_copied_mark_is_void_for_another_plan(tmp_path: Path) -> None:
    first = small_folder(tmp_path)
    second = RunFolder.create(tmp_path / "second", small_plan("another"))
    (second.path / "owner").write_bytes((first.path / "owner").read_bytes())
    assert not second.is_own()


# -- judgement and observations --------------------------------------------------------------------------------


def judgement(value: float = 0.123456789, **details: Any) -> tuple[Findings, Verdict]:
    capability = Capability(
        reachable=True, top_logprobs=20, temperature_regime="before_temperature", usage_reported=True
    )
    finding = Finding(
        check="weights", axis="weights", outcome="consistent", summary="é", details=details,
        effects=[Effect(name="effective noise", value=value, unit="nats")],
    )  # fmt: skip
    verdict = Verdict(
        weighbridge_version="0", verdict="consistent", cause=None, exact_variant=None, family=None, policy="strict",
        axes=dict.fromkeys(AXES, "consistent"), not_excluded=[], excluded=[], sentence="Fine.", error_rate="None.",
        effective_noise_nats=None, answers_used=3, requests_sent=4, prompt_tokens=5, completion_tokens=6,
        cost_usd=1 / 3, stopped_because="decided", endpoint_refused=False, observations_sha256="0",
    )  # fmt: skip
    return Findings(weighbridge_version="0", capability=capability, findings=[finding]), verdict


def test_a_judgement_is_written_canonically_to_six_digits(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    folder.write_judgement(*judgement(b=1234567.8, a=[2 / 3]))
    for name in ("findings.json", "verdict.json"):
        data = (folder.path / name).read_bytes()
        assert data == canonical_bytes(json.loads(data)) + b"\n"
    finding = json.loads((folder.path / "findings.json").read_bytes())["findings"][0]
    assert finding["effects"][0]["value"] == 0.123457
    assert finding["details"] == {"a": [0.666667], "b": 1234570}
    assert json.loads((folder.path / "verdict.json").read_bytes())["cost_usd"] == 0.333333


def test_differences_beyond_six_digits_leave_the_same_bytes(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    folder.write_judgement(*judgement(0.1234567891))
    first = (folder.path / "findings.json").read_bytes()
    folder.write_judgement(*judgement(0.1234567892))
    assert (folder.path / "findings.json").read_bytes() == first


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_judgement_with_what_is_no_number_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    folder = small_folder(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        folder.write_judgement(*judgement(odd=[value]))
    assert not (folder.path / "findings.json").exists()


def test_observations_are_written_line_by_line(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    observation = Observation(
        request_id="a", probe_id="p", answered=True, attempts=1, latency_s=1 / 3,
        top=[TopToken(bytes_hex="61", logprob_nats=-1.23456789)],
    )  # fmt: skip
    folder.write_observations([observation, observation])
    lines = (folder.path / "observations.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert json.loads(lines[0])["top"] == [{"bytes_hex": "61", "logprob_nats": -1.23457}]


# -- canonical JSON --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"a": {"b": (x,)}}])
def test_rounding_refuses_what_is_no_number(wrap: Callable[[float], Any], value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        rounded(wrap(value))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.23456789, 1.23457),
        (-0.000123456789, -0.000123457),
        (1e300 / 3, 3.33333e299),
        (0.0, 0.0),
        (7, 7),
        (True, True),
    ],
)
def test_rounding_keeps_six_significant_digits(value: float, expected: float) -> None:
    assert rounded(value) == expected
    assert type(rounded(value)) is type(expected)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=10,
    )
)  # fmt: skip
@few
def test_rounding_twice_is_rounding_once(value: Any) -> None:
    once = rounded(value)
    assert rounded(once) == once
    assert rounded(json.loads(canonical_bytes(once))) == once


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "folder" / "file"
    write_atomically(file, b"old")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("weighbridge.canonical.os.fsync", fail)
    with pytest.raises(OSError, match="full"):
        write_atomically(file, b"new")
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    assert file.read_bytes() == b"old"
