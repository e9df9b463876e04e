"""Keys: where they come from, where they go, and that they are written nowhere."""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from conftest import Ended, Weighbridge
from fault_server import (
    MODEL,
    Answer,
    Call,
    FaultServer,
    completion,
    first,
    html,
    redirect_to,
    refuses,
    steady_top,
    well_formed,
)
from weighbridge.errors import KeyRefusedError
from weighbridge.keys import Key, key_for, trust_file

NAME = "SHOP_API_KEY"
SECRET = "sk-te/st+0123456789=abcdefghijklmnop"
CONFIGURATION, INCONCLUSIVE, UNREACHABLE = 2, 3, 4

Audit = Callable[..., Ended]


@pytest.fixture(autouse=True)
def short_waits(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weighbridge.collect.FIRST_WAIT_S", 0.001)
    for name in list(os.environ):
        if name.startswith("OPENAI_"):
            monkeypatch.delenv(name)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(NAME, SECRET)
    return SECRET


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def audit(weighbridge_cli: Weighbridge, reference: str, tmp_path: Path) -> Audit:
    """`weighbridge audit` from an ENDPOINT.toml; `text` stands at its top level."""

    def audit(base_url: str, *options: object, text: str = f'api_key_env = "{NAME}"\n') -> Ended:
        file = tmp_path / "ENDPOINT.toml"
        head = f'name = "shop"\nbase_url = "{base_url}"\nmodel = "{MODEL}"\nreference = "{reference}"\n'
        file.write_text(f"{head}{text}\n[limits]\nmax_requests = 6\ntimeout_s = 5\n", "utf-8")
        return weighbridge_cli("audit", file, "--out", tmp_path / "run", *options)

    return audit


def only_error_line(ended: Ended) -> str:
    """The one line on stderr of a command that would not start."""
    assert ended.code == CONFIGURATION, ended.err
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    return lines[0]


# -- which keys are read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "   "])
def test_missing_key_is_one_line_that_names_variable_and_remedy(
    value: str | None, audit: Audit, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NAME, raising=False)
    if value is not None:
        monkeypatch.setenv(NAME, value)
    with FaultServer(well_formed) as server:
        line = only_error_line(audit(server.base_url))
        assert server.requests == []
    assert f"{NAME} is not set" in line
    assert f"export {NAME}=" in line
    assert not run.exists()


def test_missing_key_has_exit_code_2_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    ended = subprocess.run(
        [
            sys.executable, "-c", "from weighbridge.cli import main; main()",
            "doctor", "--base-url", "https://a.example/v1", "--model", MODEL, "--api-key-env", NAME,
        ],
        env=environment | {"WEIGHBRIDGE_HOME": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert NAME in only_error_line(Ended(ended.returncode, ended.stdout, ended.stderr))


@pytest.mark.parametrize(
    "name",
    ["HOME", "AWS_SECRET_ACCESS_KEY", "shop_api_key", "SHOP_API_KEY_2", "_API_KEY", "SHOP_API_KEY\\n", "API_KEY"],
)
def test_a_name_that_is_no_key_name_is_refused(name: str, audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name.replace("\\n", "\n"), SECRET)
    with FaultServer(well_formed) as server:
        line = only_error_line(audit(server.base_url, text=f'api_key_env = "{name}"\n'))
        assert server.requests == []
    assert name in line
    assert "*_API_KEY or *_AUTH_TOKEN" in line
    assert SECRET not in line


@pytest.mark.parametrize("name", ["SHOP_API_KEY", "SHOP_AUTH_TOKEN", "A2_B_API_KEY"])
def test_a_key_name_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f" {SECRET}\n")
    found = key_for(name, "https://a.example:443")
    assert found is not None
    assert found.value == SECRET


@pytest.mark.parametrize("value", ["short", "sk-with\x07bell-000", "sk-with-ümlaut-000", "sk-two\r\nX-Evil: 1"])
def test_a_value_that_is_no_key_is_refused_and_not_shown(
    value: str, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, value)
    with FaultServer(well_formed) as server:
        line = only_error_line(audit(server.base_url))
        assert server.requests == []
    assert NAME in line
    assert value not in line


def test_a_key_has_no_representation() -> None:
    assert SECRET not in repr(Key(SECRET))
    assert SECRET not in f"{Key(SECRET)}"


# -- where a key may go ----------------------------------------------------------------------------------------


def test_a_key_bound_to_one_origin_is_refused_to_another(audit: Audit, run: Path, key: str) -> None:
    assert key_for(NAME, "https://a.example:443") is not None
    line = only_error_line(audit("https://b.example/v1"))
    assert "https://a.example:443" in line
    assert "https://b.example:443" in line
    assert str(trust_file()) in line
    assert not run.exists()


@pytest.mark.parametrize(
    "origin", ["http://127.0.0.1:443", "https://a.example:444", "https://a.example.evil:443", "http://a.example:443"]
)
def test_every_part_of_an_origin_counts(origin: str, key: str) -> None:
    assert key_for(NAME, "https://a.example:443") is not None
    with pytest.raises(KeyRefusedError, match="is bound to"):
        key_for(NAME, origin)


def test_a_loopback_key_is_refused_to_the_world(key: str) -> None:
    assert key_for(NAME, "http://127.0.0.1:8080") is not None
    with pytest.raises(KeyRefusedError, match="is bound to"):
        key_for(NAME, "https://a.example:443")


def test_a_local_server_may_take_another_port(key: str) -> None:
    assert key_for(NAME, "http://127.0.0.1:8080") is not None
    assert key_for(NAME, "http://127.0.0.1:8081") is not None


def test_the_trust_file_is_private_and_holds_no_key(key: str) -> None:
    key_for(NAME, "https://a.example:443")
    assert trust_file().stat().st_mode & 0o077 == 0
    assert json.loads(trust_file().read_bytes())["origin_of_key"] == {NAME: "https://a.example:443"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"origin_of_key": 3}', '{"origin_of_key": {"SHOP_API_KEY": 5}}'])
def test_a_broken_trust_file_is_a_configuration_error(text: str, audit: Audit, key: str) -> None:
    trust_file().parent.mkdir(parents=True)
    trust_file().write_text(text, "utf-8")
    with FaultServer(well_formed) as server:
        line = only_error_line(audit(server.base_url))
        assert server.requests == []
    assert str(trust_file()) in line


def test_the_key_goes_to_its_origin_and_nowhere_else(audit: Audit, key: str) -> None:
    with FaultServer(well_formed) as elsewhere, FaultServer(redirect_to(f"{elsewhere.base_url}/x")) as server:
        ended = audit(server.base_url)
        assert [request.bearer for request in server.requests] == [SECRET]
        assert elsewhere.requests == []
    assert ended.code == UNREACHABLE


def test_every_request_of_an_audit_carries_the_key(audit: Audit, key: str) -> None:
    with FaultServer(first(3, well_formed, refuses(401, "gone"))) as server:
        audit(server.base_url)
        assert [request.bearer for request in server.requests] == [SECRET] * 4


def test_without_api_key_env_no_key_is_sent(audit: Audit, key: str) -> None:
    with FaultServer(refuses(401, "who are you")) as server:
        audit(server.base_url, text="")
        assert ["authorization" in request.headers for request in server.requests] == [False]


# -- what else may leave ---------------------------------------------------------------------------------------

AMBIENT = {
    "OPENAI_API_KEY": "ambient-secret-api-key",
    "OPENAI_ADMIN_KEY": "ambient-secret-admin-key",
    "OPENAI_ORG_ID": "ambient-secret-organisation",
    "OPENAI_PROJECT_ID": "ambient-secret-project",
    "OPENAI_WEBHOOK_SECRET": "ambient-secret-webhook",
    "OPENAI_CUSTOM_HEADERS": "X-Extra: ambient-secret-extra\nX-Stainless-Extra: ambient-secret-stainless\n"
    "User-Agent: ambient-secret-agent\nAuthorization: Bearer ambient-secret-bearer",
}


@pytest.mark.parametrize("name", AMBIENT)
@pytest.mark.parametrize("keyed", [True, False])
def test_what_the_environment_holds_never_leaves(
    keyed: bool, name: str, audit: Audit, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, AMBIENT[name])
    with FaultServer(refuses(401, "no")) as server:
        audit(server.base_url, **({} if keyed else {"text": ""}))
        sent = json.dumps([(request.headers, request.document) for request in server.requests])
        assert len(server.requests) == 1
    assert re.findall(r"ambient-secret-\w+", sent) == []


def test_an_ambient_base_url_is_not_used(audit: Audit, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer(well_formed) as elsewhere, FaultServer(refuses(401, "no")) as server:
        for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, elsewhere.base_url)
        audit(server.base_url)
        assert len(server.requests) == 1
        assert elsewhere.requests == []


def test_a_netrc_file_is_not_read(audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login ambient password secret\n", "utf-8")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    with FaultServer(refuses(401, "no")) as server:
        audit(server.base_url, text="")
        assert "authorization" not in server.requests[0].headers


def test_a_client_that_identifies_itself_names_its_library(audit: Audit, key: str) -> None:
    with FaultServer(refuses(401, "no")) as server:
        audit(server.base_url)
        headers = server.requests[0].headers
    assert any(name.startswith("x-stainless-") for name in headers)


def test_a_client_that_does_not_identify_itself_says_little(audit: Audit, key: str) -> None:
    with FaultServer(refuses(401, "no")) as server:
        audit(server.base_url, text=f'api_key_env = "{NAME}"\nidentify_client = false\n')
        headers = server.requests[0].headers
    assert set(headers) == {
        "host", "accept", "accept-encoding", "authorization", "connection", "content-length", "content-type", "user-agent",
    }  # fmt: skip
    assert headers["user-agent"] == "python"


# -- a server that echoes the key ------------------------------------------------------------------------------

DISGUISES: dict[str, Callable[[str], str]] = {
    "percent": lambda key: quote(key, safe=""),
    "percent, lower case": lambda key: quote(key, safe="").replace("%2F", "%2f").replace("%2B", "%2b"),
    "percent, path": lambda key: quote(key),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 for URLs": lambda key: base64.urlsafe_b64encode(key.encode()).decode(),
    "base64 of the header": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "base64 as basic auth": lambda key: base64.b64encode(f"me:{key}:x".encode()).decode(),
    "hexadecimal": lambda key: key.encode().hex(),
    "upper-case hexadecimal": lambda key: key.encode().hex().upper(),
}


def in_message(text: str) -> Answer:
    return refuses(401, f"the key {text} is wrong")


def in_plain_body(text: str) -> Answer:
    return lambda call: call.send(200, f"<p>{text}</p>".encode())


def in_header(text: str) -> Answer:
    return refuses(401, "no", x_request_id=f"<{text}>", server=text, via=text)


def in_redirect(text: str) -> Answer:
    return redirect_to(f"https://elsewhere.example/?key={text}")


def in_encoding(text: str) -> Answer:
    """Refused by the transport itself, with a detail of its own."""
    return lambda call: call.send(200, b"x", {"content-encoding": text})


def in_model_names(text: str) -> Answer:
    """Well-formed answers that carry it wherever an answer has a text."""
    document = completion(steady_top(20)) | {"model": text, "provider": text, "system_fingerprint": text}
    document["choices"][0]["finish_reason"] = text

    def answer(call: Call) -> None:
        if call.request.number <= 2:
            call.send_json(200, document)
        else:
            in_message(text)(call)

    return answer


PLACES = (in_message, in_plain_body, in_header, in_redirect, in_encoding, in_model_names)


def leaks(ended: Ended, run: Path, *secrets: str) -> list[str]:
    """Where a secret stands: streams, files' names and files' bytes."""
    texts = {"stdout": ended.out.replace("\n", ""), "stderr": ended.err.replace("\n", "")}
    texts |= {file.name: file.read_text("utf-8", "replace") for file in run.rglob("*") if file.is_file()}
    return sorted({name for name, text in texts.items() for secret in secrets if secret in text})


def assert_written_nowhere(answer: Answer, shown: str, audit: Audit, run: Path) -> None:
    with FaultServer(answer) as server:
        ended = audit(server.base_url)
        assert {request.bearer for request in server.requests} == {SECRET}
    assert ended.code in (INCONCLUSIVE, UNREACHABLE)
    assert leaks(ended, run, SECRET, shown) == []


@pytest.mark.parametrize("place", PLACES)
def test_an_echoed_key_is_written_nowhere(place: Callable[[str], Answer], audit: Audit, run: Path, key: str) -> None:
    assert_written_nowhere(place(SECRET), SECRET, audit, run)


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("place", [in_message, in_redirect])
def test_a_disguised_key_is_written_nowhere(
    place: Callable[[str], Answer], disguise: str, audit: Audit, run: Path, key: str
) -> None:
    shown = DISGUISES[disguise](SECRET)
    assert_written_nowhere(place(shown), shown.rstrip("="), audit, run)


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in text)


@pytest.mark.parametrize(
    "escape", [escaped, lambda key: key.replace("/", "\\/"), lambda key: escaped(key[:1]) + key[1:]],
    ids=["all", "slashes, as PHP does", "one character"],
)  # fmt: skip
def test_a_key_that_json_escapes_hide_is_written_nowhere(
    escape: Callable[[str], str], audit: Audit, run: Path, key: str
) -> None:
    body = f'{{"error": {{"message": "the key {escape(SECRET)} is wrong"}}}}'.encode()
    with FaultServer(lambda call: call.send(401, body)) as server:
        ended = audit(server.base_url)
    assert ended.code == UNREACHABLE
    assert leaks(ended, run, SECRET, escape(SECRET)) == []


@pytest.mark.parametrize("kept", [500, 4096], ids=["header", "oversized body"])
def test_a_key_that_a_limit_cuts_is_not_kept_in_part(kept: int, audit: Audit, run: Path, key: str) -> None:
    """The limits on what is kept fall into the middle of the key."""
    most = SECRET[:-4]
    echo = "x" * (kept - len(most)) + SECRET

    def answer(call: Call) -> None:
        if kept == 500:
            call.send_json(401, {}, {"x-request-id": echo})
        else:
            call.start(200, {"content-length": str(9 * 2**20)})
            call.stream([echo.encode(), b" " * (9 * 2**20 - len(echo))])

    with FaultServer(answer) as server:
        ended = audit(server.base_url)
    assert ended.code == UNREACHABLE
    assert leaks(ended, run, most) == []


def test_a_key_in_an_answer_that_is_not_utf8_is_written_nowhere(audit: Audit, run: Path, key: str) -> None:
    with FaultServer(lambda call: call.send(200, b"\xff " + SECRET.encode() + b" \xfe")) as server:
        ended = audit(server.base_url)
    received = [json.loads(line) for line in (run / "exchanges.jsonl").read_text("utf-8").splitlines()]
    body = base64.b64decode(next(line["body_base64"] for line in received if line.get("body_base64")))
    assert SECRET.encode() not in body
    assert leaks(ended, run, SECRET) == []


@pytest.mark.parametrize("command", ["replay", "resume", "doctor", "audit --json"])
def test_no_command_shows_the_key(
    command: str, audit: Audit, run: Path, key: str, weighbridge_cli: Weighbridge
) -> None:
    with FaultServer(in_model_names(SECRET)) as server:
        json_option = ["--json"] if command.endswith("--json") else []
        ended = audit(server.base_url, *json_option)
        if command == "doctor":
            where = ("--base-url", server.base_url, "--model", MODEL, "--api-key-env", NAME)
            ended = weighbridge_cli("doctor", *where)
        elif not json_option:
            ended = weighbridge_cli(command, run, "--json")
    assert ended.out
    assert leaks(ended, run, SECRET) == []


def test_the_run_folder_names_the_variable_and_not_the_key(audit: Audit, run: Path, key: str) -> None:
    with FaultServer(first(3, well_formed, html)) as server:
        ended = audit(server.base_url)
    assert NAME in (run / "plan.json").read_text("utf-8")
    assert leaks(ended, run, SECRET) == []


# -- a run of somebody else's ----------------------------------------------------------------------------------


@pytest.fixture
def interrupted(audit: Audit, run: Path, key: str) -> Callable[[FaultServer], None]:
    def make(server: FaultServer) -> None:
        assert audit(server.base_url).code == UNREACHABLE
        server.requests.clear()

    return make


def forget_mark(run: Path) -> None:
    (run / "owner").unlink()


def forge_mark(run: Path) -> None:
    (run / "owner").write_text("0" * 64, "ascii")


def write_no_text_as_mark(run: Path) -> None:
    (run / "owner").write_bytes(b"\xff\xfe")


def change_url(run: Path) -> None:
    change(run, base_url="https://evil.example/v1")


def change_key_name(run: Path) -> None:
    change(run, api_key_env="OTHER_API_KEY")


def change_extra_body(run: Path) -> None:
    change(run, extra_body={"note": "x"})


def change(run: Path, **fields: object) -> None:
    plan = json.loads((run / "plan.json").read_bytes())
    plan["endpoint"] |= fields
    (run / "plan.json").write_text(json.dumps(plan), "utf-8")


STRANGERS = (forget_mark, forge_mark, write_no_text_as_mark, change_url, change_key_name, change_extra_body)


@pytest.mark.parametrize("estrange", STRANGERS)
def test_resume_refuses_a_run_that_is_not_ones_own(
    estrange: Callable[[Path], None],
    interrupted: Callable[[FaultServer], None],
    run: Path,
    weighbridge_cli: Weighbridge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTHER_API_KEY", SECRET)
    with FaultServer(first(3, well_formed, refuses(401, "gone"))) as server:
        interrupted(server)
        estrange(run)
        line = only_error_line(weighbridge_cli("resume", run))
        assert server.requests == []
    assert str(run) in line
    assert "--base-url" in line


def test_resume_of_anothers_run_sends_no_key_unless_it_is_given_again(
    interrupted: Callable[[FaultServer], None], run: Path, weighbridge_cli: Weighbridge
) -> None:
    with FaultServer(first(3, well_formed, refuses(401, "gone"))) as server:
        interrupted(server)
        forget_mark(run)
        ended = weighbridge_cli("resume", run, "--base-url", server.base_url)
        assert [request.bearer for request in server.requests] == [""]
        assert ended.code == UNREACHABLE
        server.requests.clear()
        weighbridge_cli("resume", run, "--base-url", server.base_url, "--api-key-env", NAME)
        assert [request.bearer for request in server.requests] == [SECRET]


def test_resume_with_the_url_given_again_asks_there_and_not_where_the_plan_says(
    interrupted: Callable[[FaultServer], None], run: Path, weighbridge_cli: Weighbridge
) -> None:
    with FaultServer(well_formed) as trap, FaultServer(first(3, well_formed, refuses(401, "gone"))) as server:
        interrupted(server)
        change(run, base_url=trap.base_url)
        ended = weighbridge_cli("resume", run, "--base-url", server.base_url, "--api-key-env", NAME)
        assert trap.requests == []
        assert len(server.requests) == 1
    assert ended.code == UNREACHABLE


def test_ones_own_run_is_resumed_with_its_key(
    interrupted: Callable[[FaultServer], None], run: Path, weighbridge_cli: Weighbridge
) -> None:
    with FaultServer(first(3, well_formed, refuses(401, "gone"))) as server:
        interrupted(server)
        assert weighbridge_cli("resume", run).code == UNREACHABLE
        assert [request.bearer for request in server.requests] == [SECRET]


def test_resume_binds_the_key_to_its_origin_too(
    interrupted: Callable[[FaultServer], None], run: Path, weighbridge_cli: Weighbridge
) -> None:
    with FaultServer(first(3, well_formed, refuses(401, "gone"))) as server:
        interrupted(server)
        line = only_error_line(
            weighbridge_cli("resume", run, "--base-url", "https://evil.example/v1", "--api-key-env", NAME)
        )
    assert "is bound to" in line
