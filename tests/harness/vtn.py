"""A small OpenADR 3.1 VTN for tests: a process of its own, written from the specification on http.server.

It has tokens (client credentials), programs, events with pages, subscriptions with the echo challenge, and
notifications to the callback. `/test/...` is for the test that drives it: what it serves, and how it fails.
"""

import http.client
import http.server
import json
import secrets
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

WAIT_S = 20.0
CLIENT_ID, SECRET, PROGRAM = "ven-1", "s3cret", "demand-response"
ROOT = Path(__file__).resolve().parents[2]
_HUGE_BYTES = 1 << 30


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tokens: set[str] = set()
        self.token_s = 3600.0
        self.fault = ""
        self.token_url = ""  # empty: its own
        self.events: dict[str, dict[str, Any]] = {}
        self.program: dict[str, Any] = {"id": "p0", "programName": PROGRAM, "payloadDescriptors": []}
        self.subscriptions: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.released = threading.Event()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: _State

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parts.query)
        try:
            if parts.path.startswith("/test/"):
                self._test(parts.path.removeprefix("/test/"), json.loads(body or b"null"))
            elif not self._fails():
                self._serve(parts.path, query, body)
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True

    def _fails(self) -> bool:
        fault = self.state.fault
        if fault == "500":
            self._say(500, {"title": "Internal Server Error", "status": 500})
        elif fault == "html":
            self._send(200, b"<html>Down for maintenance</html>", "text/html")
        elif fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault == "hang":
            self.state.released.wait(WAIT_S)
            self.close_connection = True
        elif fault == "huge":
            self.send_response(200)
            self.send_header("Content-Length", str(_HUGE_BYTES))
            self.end_headers()
            self.wfile.write(b"[" + b" " * (1 << 20))
            for _ in range(_HUGE_BYTES >> 20):
                self.wfile.write(b" " * (1 << 20))
        return bool(fault)

    def _serve(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        state = self.state
        with state.lock:
            key = f"{self.command} {path}"
            state.counts[key] = state.counts.get(key, 0) + 1
        if key == "GET /auth/server":
            own = f"http://{self.headers['Host']}/auth/token"
            self._say(200, {"tokenURL": state.token_url or own})
        elif key == "POST /auth/token":
            self._token(urllib.parse.parse_qs(body.decode()))
        elif (self.headers.get("Authorization") or "").removeprefix("Bearer ") not in state.tokens:
            self._say(403, {"title": "Forbidden", "status": 403})
        elif key == "GET /programs":
            self._page([state.program], query)
        elif key == f"GET /programs/{state.program['id']}":
            self._say(200, state.program)
        elif key == "GET /events":
            wanted = query.get("programID", [""])[0]
            self._page([e for e in state.events.values() if e.get("programID") == wanted], query)
        elif key == "GET /subscriptions":
            self._page(state.subscriptions, query)
        elif key == "POST /subscriptions":
            self._subscribe(json.loads(body))
        else:
            self._say(404, {"title": "Not Found", "status": 404})

    def _token(self, form: dict[str, list[str]]) -> None:
        wanted = {"grant_type": ["client_credentials"], "client_id": [CLIENT_ID], "client_secret": [SECRET]}
        if form != wanted:
            self._say(401, {"error": "invalid_client"})
            return
        token = secrets.token_urlsafe()
        self.state.tokens.add(token)
        self._say(200, {"access_token": token, "token_type": "Bearer", "expires_in": self.state.token_s})

    def _page(self, objects: list[dict[str, Any]], query: dict[str, list[str]]) -> None:
        skip, limit = int(query.get("skip", ["0"])[0]), int(query.get("limit", ["50"])[0])
        if not 0 <= limit <= 50:
            self._say(400, {"title": "Bad Request", "status": 400})
            return
        self._say(200, objects[skip : skip + limit])

    def _subscribe(self, wanted: dict[str, Any]) -> None:
        """Take a subscription on, once its callback has echoed a challenge."""
        for operation in wanted["objectOperations"]:
            challenge = secrets.token_urlsafe()
            url = f"{operation['callbackUrl']}?{urllib.parse.urlencode({'echo': challenge})}"
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                if answer.status != 200 or challenge not in answer.read().decode():
                    self._say(400, {"title": "Bad Request", "status": 400, "detail": "no echo"})
                    return
        made = {**wanted, "id": f"s{len(self.state.subscriptions)}", "objectType": "SUBSCRIPTION"}
        self.state.subscriptions.append(made)
        self._say(201, made)

    def _test(self, what: str, value: Any) -> None:
        state = self.state
        if what == "events":
            before, state.events = state.events, {event["id"]: event for event in value}
            for name in sorted({*before, *state.events}):
                if before.get(name) != state.events.get(name):
                    made = "UPDATE" if name in before else "CREATE"
                    gone = name not in state.events
                    self._notify("DELETE" if gone else made, state.events.get(name) or before[name])
        elif what == "program":
            state.program = {**state.program, **value}
        elif what == "fault":
            state.fault = value
            state.released.set() if value != "hang" else state.released.clear()
        elif what == "token":
            state.token_s = value
        elif what == "token_url":
            state.token_url = value
        elif what == "revoke":
            state.tokens.clear()
        self._say(200, {"counts": state.counts, "subscriptions": state.subscriptions})

    def _notify(self, operation: str, event: dict[str, Any]) -> None:
        body = json.dumps({"objectType": "EVENT", "operation": operation, "object": event}).encode()
        for subscription in self.state.subscriptions:
            for one in subscription["objectOperations"]:
                headers = {"Content-Type": "application/json"}
                request = urllib.request.Request(
                    one["callbackUrl"], data=body, headers=headers, method="POST"
                )
                with urllib.request.urlopen(request, timeout=WAIT_S):
                    pass

    def _say(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Vtn:
    """The process, as a test drives it; a context that leaves none behind."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, on the port of before if it had one; it knows nothing of its past."""
        command = [sys.executable, "-m", "tests.harness.vtn", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def tell(self, what: str, value: Any = None) -> dict[str, Any]:
        """Change what it serves or how it fails; returns what it has counted."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            connection.request("PUT", f"/test/{what}", json.dumps(value))
            told: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return told

    def events(self, *events: dict[str, Any]) -> None:
        """Serve these events and no others, and notify who has subscribed."""
        self.tell("events", list(events))

    def count(self, request: str) -> int:
        """How often it has served this: `GET /events`."""
        return int(self.tell("look")["counts"].get(request, 0))


def event(
    name: str,
    payload: str,
    value: Any,
    *,
    after_s: float = 0.0,
    lasts: str = "PT1H",
    units: str = "KW",
    **fields: Any,
) -> dict[str, Any]:
    """An event of one interval that starts `after_s` from now."""
    start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + after_s))
    return {
        "id": name,
        "programID": "p0",
        "objectType": "EVENT",
        "modificationDateTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "payloadDescriptors": [{"payloadType": payload, "units": units, "currency": "USD"}],
        "intervalPeriod": {"start": start, "duration": lasts},
        "intervals": [{"id": 0, "payloads": [{"type": payload, "values": [value]}]}],
        **fields,
    }


def main() -> None:
    state = _State()
    handler = type("Handler", (_Handler,), {"state": state})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
