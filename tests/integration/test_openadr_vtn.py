"""The wire to a VTN, a real process on loopback: tokens, pages, faults; and the webhook that it notifies."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.effects.openadr import HANGING_MAX, HttpVtn, VtnObjects, read_secret
from scheduler.effects.webhook import BODY_BYTES_MAX, Webhook
from scheduler.errors import FeedError
from scheduler.model.settings import OpenAdrConfig
from tests.harness.vtn import CLIENT_ID, PROGRAM, SECRET, Vtn, event

PATIENT_S = 20.0


@pytest.fixture
def vtn() -> Iterator[Vtn]:
    with Vtn() as process:
        yield process


@pytest.fixture
def config(vtn: Vtn, tmp_path: Path) -> OpenAdrConfig:
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    secret.chmod(0o600)
    return OpenAdrConfig(vtn_url=vtn.url, client_id=CLIENT_ID, client_secret_file=secret, program=PROGRAM)


def poll(client: HttpVtn) -> VtnObjects:
    return asyncio.run(client.poll())


def problem(client: HttpVtn) -> str:
    with pytest.raises(FeedError) as raised:
        poll(client)
    return str(raised.value)


def test_events_of_the_program_are_read_page_by_page(vtn: Vtn, config: OpenAdrConfig) -> None:
    vtn.events(*(event(f"e{n}", "SIMPLE", 1) for n in range(120)), event("x", "SIMPLE", 1, programID="p1"))
    found = poll(HttpVtn(config, PATIENT_S))
    assert {one["id"] for one in found.events} == {f"e{n}" for n in range(120)}
    assert len(found.events) == 120
    assert found.program["programName"] == PROGRAM
    assert vtn.count("GET /events") == 3


def test_a_token_serves_until_it_ends_and_one_that_is_revoked_is_replaced(
    vtn: Vtn, config: OpenAdrConfig
) -> None:
    client = HttpVtn(config, PATIENT_S)
    for _ in range(3):
        poll(client)
    assert vtn.count("POST /auth/token") == 1
    vtn.tell("revoke")
    poll(client)
    assert vtn.count("POST /auth/token") == 2
    vtn.tell("token", 1e-6)  # ends before it is used again
    vtn.tell("revoke")
    poll(client)
    before = vtn.count("POST /auth/token")
    poll(client)
    assert vtn.count("POST /auth/token") > before


def test_a_wrong_secret_is_said_and_not_shown(config: OpenAdrConfig) -> None:
    path = config.client_secret_file
    assert path is not None
    path.write_text("wr0ng")
    text = problem(HttpVtn(config, PATIENT_S))
    assert "/auth/token answered 401" in text
    assert "wr0ng" not in text


@pytest.mark.parametrize(
    "url", ["http://example.org/token", "file:///etc/passwd", "https://u:p@example.org/"]
)
def test_the_secret_goes_nowhere_that_can_not_be_trusted(url: str, vtn: Vtn, config: OpenAdrConfig) -> None:
    vtn.tell("token_url", url)
    assert "a URL that can't be trusted" in problem(HttpVtn(config, PATIENT_S))


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(b"s", 0o604, "chmod o-rwx"), (b"", 0o600, "must hold the secret"), (b"\xff", 0o600, "is no text")],
)
def test_a_secret_that_is_none_or_that_others_may_read_is_refused(
    content: bytes, mode: int, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(FeedError, match=words):
        read_secret(path)
    with pytest.raises(FeedError, match="can't be read"):
        read_secret(tmp_path / "none")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "answered 500"),
        ("html", "did not answer in JSON"),
        ("huge", "larger than 8 MiB"),
        ("redirect", "answered 302"),
    ],
)
def test_a_vtn_that_fails_is_said_and_asked_again(
    fault: str, words: str, vtn: Vtn, config: OpenAdrConfig
) -> None:
    client = HttpVtn(config, PATIENT_S)
    vtn.tell("fault", fault)
    assert words in problem(client)
    vtn.tell("fault", "")
    assert poll(client).events == ()


def test_a_vtn_that_hangs_holds_few_threads_and_nobody_waits_for_them(
    vtn: Vtn, config: OpenAdrConfig
) -> None:
    client = HttpVtn(config, 0.05)
    vtn.tell("fault", "hang")
    before = threading.active_count()
    for _ in range(3 * HANGING_MAX):
        assert "did not answer within 0.05 s" in problem(client) or "hang" in problem(client)
    assert threading.active_count() <= before + HANGING_MAX


def test_a_vtn_that_is_gone_is_said(vtn: Vtn, config: OpenAdrConfig) -> None:
    vtn.kill()
    assert "can't be read: <urlopen error [Errno 111] Connection refused>" in problem(
        HttpVtn(config, PATIENT_S)
    )


def test_a_program_that_is_not_there_is_named(config: OpenAdrConfig) -> None:
    assert "no program 'other'" in problem(HttpVtn(replace(config, program="other"), PATIENT_S))


def test_a_webhook_is_subscribed_once_after_its_echo_and_hints_at_each_change(
    vtn: Vtn, config: OpenAdrConfig
) -> None:
    async def follow() -> int:
        hinted = asyncio.Event()
        webhook = Webhook("/cb", hinted.set)
        _, port = await webhook.start("127.0.0.1", 0)
        client, count = HttpVtn(config, PATIENT_S), 0
        try:
            await client.poll()
            for _ in range(2):
                await client.subscribe("wattshift-test", f"http://127.0.0.1:{port}/cb")
            for events in ([event("e", "SIMPLE", 1)], [event("e", "SIMPLE", 2)], []):
                await asyncio.to_thread(vtn.events, *events)
                await asyncio.wait_for(hinted.wait(), PATIENT_S)
                hinted.clear()
                count += 1
        finally:
            webhook.close()
        return count

    assert asyncio.run(follow()) == 3
    (subscription,) = vtn.tell("look")["subscriptions"]
    assert subscription["objectOperations"][0]["objects"] == ["EVENT", "PROGRAM"]


def test_a_subscription_without_its_echo_is_refused(vtn: Vtn, config: OpenAdrConfig) -> None:
    async def subscribe() -> None:
        webhook = Webhook("/other", lambda: None)
        _, port = await webhook.start("127.0.0.1", 0)
        client = HttpVtn(config, PATIENT_S)
        try:
            await client.poll()
            await client.subscribe("wattshift-test", f"http://127.0.0.1:{port}/cb")
        finally:
            webhook.close()

    with pytest.raises(FeedError):
        asyncio.run(subscribe())


NOTICE = json.dumps({"objectType": "EVENT", "operation": "CREATE", "object": {}}).encode()


@pytest.mark.parametrize(
    ("request_bytes", "status", "hints"),
    [
        (b"GET /cb?echo=a%20b HTTP/1.1\r\n\r\n", 200, 0),
        (b"GET /cb HTTP/1.1\r\n\r\n", 400, 0),
        (b"GET /cb?echo=" + b"x" * 2000 + b" HTTP/1.1\r\n\r\n", 400, 0),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 404, 0),
        (b"DELETE /cb HTTP/1.1\r\n\r\n", 405, 0),
        (b"nonsense\r\n\r\n", 400, 0),
        (b"POST /cb HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(NOTICE), NOTICE), 200, 1),
        (b"POST /cb HTTP/1.1\r\ncontent-length: 2\r\n\r\n[]", 400, 0),
        (b"POST /cb HTTP/1.1\r\nContent-Length: 4\r\n\r\nnone", 400, 0),
        (b'POST /cb HTTP/1.1\r\nContent-Length: 20\r\n\r\n{"objectType":"VEN"}', 200, 0),
        (b'POST /cb HTTP/1.1\r\nContent-Length: 17\r\n\r\n{"objectType":[]}', 200, 0),
        (b"POST /cb HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411, 0),
        (b"POST /cb HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1), 413, 0),
        (b"POST /cb HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 411, 0),
    ],
)
def test_the_webhook_answers_any_request(request_bytes: bytes, status: int, hints: int) -> None:
    hinted = []

    async def ask() -> bytes:
        webhook = Webhook("/cb", lambda: hinted.append(1))
        address = await webhook.start("127.0.0.1", 0)
        try:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request_bytes)
            answer = await asyncio.wait_for(reader.read(), PATIENT_S)
            writer.close()
            await writer.wait_closed()
        finally:
            webhook.close()
        return answer

    answer = asyncio.run(ask())
    assert int(answer.split(b" ")[1]) == status
    assert len(hinted) == hints
    if b"echo=a" in request_bytes:
        assert answer.endswith(b"\r\n\r\na b")


def test_an_address_that_can_not_be_had_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FeedError, match=f"webhook_listen 127.0.0.1:{port} can't be had"):
            asyncio.run(Webhook("/", lambda: None).start("127.0.0.1", port))
