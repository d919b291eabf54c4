"""An OpenADR 3.1 VTN over HTTP: tokens, the program, its events, a subscription to notifications.

Every request has a deadline and a size limit and follows no redirect: one would take the token along.
"""

import asyncio
import contextlib
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from scheduler.errors import FeedError
from scheduler.model.openadr import EVENTS_MAX
from scheduler.model.settings import OpenAdrConfig, url_problem

# A page of events with a thousand intervals each would not reach it.
ANSWER_BYTES_MAX = 8 << 20
REQUEST_S_MAX = 10.0
# A poll is some requests, of which each may be slow.
EXCHANGE_REQUESTS_MAX = 4
# Requests that a server has let hang; while so many do, no other is begun.
HANGING_MAX = 2
PAGE_OBJECTS = 50  # the most that the specification lets a client ask for
PROGRAMS_MAX = 1000
SECRET_BYTES_MAX = 4096
TOKEN_CHARACTERS_MAX = 16_384
# A token is renewed so long before it ends, and one whose life is not told is kept so long.
TOKEN_MARGIN_S = 30.0
TOKEN_S_UNKNOWN = 300.0
_PIECE_BYTES = 64 * 1024
_UNAUTHORIZED = (401, 403)
_CREATED = (200, 201)
_MISSING = (404, 405, 501)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class VtnObjects:
    """What a VTN says of a program, unread: JSON objects."""

    program: Any
    events: tuple[Any, ...]


class Vtn(Protocol):
    """A VTN as a VEN sees it."""

    @property
    def name(self) -> str:
        """The VTN for a person."""

    async def poll(self) -> VtnObjects:
        """Everything that it says now.

        Raises:
            FeedError: It could not be read; the words say why.
        """

    async def subscribe(self, client_name: str, callback_url: str) -> None:
        """Be notified at the URL when events or the program change; once is enough.

        Raises:
            FeedError: The VTN won't.
        """


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Refused(FeedError):
    """An answer that is no success; `status` is HTTP's."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class HttpVtn:
    """The VTN that the configuration names."""

    def __init__(self, config: OpenAdrConfig, request_s_max: float = REQUEST_S_MAX) -> None:
        """Take the settings, and how long a request may take in all."""
        self._config = config
        self._base = config.vtn_url.rstrip("/")
        self._request_s_max = request_s_max
        self._open = urllib.request.build_opener(_NoRedirects()).open
        self._hanging = threading.BoundedSemaphore(HANGING_MAX)
        self._token = ""
        self._token_ends = 0.0  # by the monotonic clock
        self._program_id = ""

    @property
    def name(self) -> str:
        parts = urlsplit(self._base)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    async def poll(self) -> VtnObjects:
        return await self._in_thread(self._poll)

    async def subscribe(self, client_name: str, callback_url: str) -> None:
        await self._in_thread(lambda: self._subscribe(client_name, callback_url))

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        """Run it in a thread that nobody waits for where a server lets it hang, at exit neither."""
        if not self._hanging.acquire(blocking=False):
            raise FeedError(f"{self.name} lets {HANGING_MAX} requests hang; no other is begun meanwhile")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def tell(result: _T | None, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as caught:
                error = caught
            finally:
                self._hanging.release()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(tell, result, error)

        threading.Thread(target=run, name="openadr", daemon=True).start()
        try:
            return await asyncio.wait_for(answer, EXCHANGE_REQUESTS_MAX * self._request_s_max)
        except TimeoutError as error:
            raise FeedError(f"{self.name} takes more time than it may have") from error

    # What follows runs in that thread ------------------------------------------------------------

    def _poll(self) -> VtnObjects:
        program = self._program()
        query = [("programID", self._program_id), *(("targets", one) for one in self._config.targets)]
        return VtnObjects(program, tuple(self._pages("/events", query, EVENTS_MAX)))

    def _program(self) -> Any:
        if self._program_id:
            try:
                return self._ask("GET", f"/programs/{quote(self._program_id, safe='')}")
            except _Refused as error:
                if error.status not in _MISSING:
                    raise
                self._program_id = ""  # it was deleted, and may be there again under another id
        wanted = self._config.program
        targets = [("targets", one) for one in self._config.targets]
        for program in self._pages("/programs", targets, PROGRAMS_MAX):
            known = program.get("id") if isinstance(program, dict) else None
            if isinstance(known, str) and known and wanted in (known, program.get("programName")):
                self._program_id = known
                return program
        raise FeedError(f"{self.name} has no program {wanted!r} for this client; see [openadr] program")

    def _pages(self, path: str, query: list[tuple[str, str]], objects_max: int) -> list[Any]:
        """The objects of all pages, one more than `objects_max` at the most."""
        found: list[Any] = []
        while len(found) <= objects_max:
            page_query = urlencode([*query, ("skip", str(len(found))), ("limit", str(PAGE_OBJECTS))])
            page = self._ask("GET", f"{path}?{page_query}")
            if not isinstance(page, list):
                raise FeedError(f"{self.name}{path} is no array; is [openadr] vtn_url the API's base?")
            new = page if not found or page[:1] != found[:1] else []  # a server that knows no pages
            found += new
            if len(new) != PAGE_OBJECTS:
                break
        return found[: objects_max + 1]

    def _subscribe(self, client_name: str, callback_url: str) -> None:
        query = [("programID", self._program_id), ("clientName", client_name)]
        for one in self._pages("/subscriptions", query, PROGRAMS_MAX):
            operations = one.get("objectOperations") if isinstance(one, dict) else None
            if any(isinstance(o, dict) and o.get("callbackUrl") == callback_url for o in operations or ()):
                return
        wanted = {
            "clientName": client_name,
            "programID": self._program_id,
            "objectOperations": [
                {
                    "objects": ["EVENT", "PROGRAM"],
                    "operations": ["CREATE", "UPDATE", "DELETE"],
                    "callbackUrl": callback_url,
                }
            ],
        }
        if self._config.targets:
            wanted["targets"] = list(self._config.targets)
        self._ask("POST", "/subscriptions", msgspec.json.encode(wanted))

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The JSON that a request brings, with a token where the VTN wants one."""
        if not self._config.client_id:
            return self._send(method, self._base + path, body, {})
        fresh = self._renew_token()
        try:
            return self._send(method, self._base + path, body, {"Authorization": f"Bearer {self._token}"})
        except _Refused as error:
            if error.status not in _UNAUTHORIZED or fresh:
                raise
        self._token = ""  # it ended before its time
        self._renew_token()
        return self._send(method, self._base + path, body, {"Authorization": f"Bearer {self._token}"})

    def _renew_token(self) -> bool:
        """See that there is a token; whether it is a new one."""
        if self._token and time.monotonic() < self._token_ends:
            return False
        form = {
            "grant_type": "client_credentials",
            "client_id": self._config.client_id,
            "client_secret": self._secret(),
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = self._send("POST", self._token_url(), urlencode(form).encode(), headers)
        token = answer.get("access_token") if isinstance(answer, dict) else None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise FeedError(f"{self.name} gave no access_token")
        if not 0 < len(token) <= TOKEN_CHARACTERS_MAX:
            raise FeedError(f"{self.name} gave an access_token of {len(token)} characters")
        lasts_s = answer.get("expires_in")
        if isinstance(lasts_s, bool) or not isinstance(lasts_s, int | float) or not lasts_s > 0:
            lasts_s = TOKEN_S_UNKNOWN
        self._token = token
        self._token_ends = time.monotonic() + max(lasts_s / 2, lasts_s - TOKEN_MARGIN_S)
        return True

    def _token_url(self) -> str:
        """Where tokens are had: what the VTN says, else its own."""
        try:
            answer = self._send("GET", f"{self._base}/auth/server", None, {})
        except _Refused as error:
            if error.status not in (*_UNAUTHORIZED, *_MISSING):
                raise
            return f"{self._base}/auth/token"
        url = answer.get("tokenURL") if isinstance(answer, dict) else None
        if not isinstance(url, str):
            return f"{self._base}/auth/token"
        if remedy := url_problem(url):
            raise FeedError(f"{self.name} sends us for tokens to a URL that can't be trusted: it {remedy}")
        return url

    def _secret(self) -> str:
        path = self._config.client_secret_file
        assert path is not None  # goes with client_id
        return read_secret(path)

    def _send(self, method: str, url: str, body: bytes | None, headers: dict[str, str]) -> Any:
        """The JSON of an answer.

        Raises:
            FeedError: There is none, or it is none; of another status than success a `_Refused`.
        """
        said = {"Accept": "application/json", "User-Agent": "wattshift", **headers}
        if body is not None:
            said.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(url, data=body, headers=said, method=method)
        place = f"{urlsplit(url).scheme}://{urlsplit(url).netloc}{urlsplit(url).path}"
        ends = time.monotonic() + self._request_s_max
        try:
            with self._open(request, timeout=self._request_s_max) as answer:
                text = _read(answer, ends)
        except urllib.error.HTTPError as error:
            error.close()
            raise _Refused(error.code, f"{place} answered {error.code} {error.reason}"[:256]) from error
        except TimeoutError as error:
            raise FeedError(f"{place} did not answer within {self._request_s_max:g} s") from error
        except (OSError, ValueError, HTTPException) as error:
            raise FeedError(f"{place} can't be read: {error}"[:512]) from error
        try:
            return msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise FeedError(f"{place} did not answer in JSON: {error}"[:512]) from error


def read_secret(path: Path) -> str:
    """The secret in a file that others can't read.

    Raises:
        FeedError: There is none, or others could read it.
    """
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXO:
                raise FeedError(f"[openadr] client_secret_file: others may read {path}; chmod o-rwx it")
            raw = file.read(SECRET_BYTES_MAX + 1)
        secret = raw.decode().strip()
    except OSError as error:
        raise FeedError(f"[openadr] client_secret_file {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FeedError(f"[openadr] client_secret_file {path} is no text") from error
    if not secret or len(raw) > SECRET_BYTES_MAX:
        raise FeedError(
            f"[openadr] client_secret_file {path} must hold the secret, at most {SECRET_BYTES_MAX} bytes"
        )
    return secret


def _read(answer: HTTPResponse, ends: float) -> bytes:
    """The body, within its time and size, however slowly it comes."""
    pieces, size = [], 0
    while piece := answer.read1(_PIECE_BYTES):
        size += len(piece)
        if size > ANSWER_BYTES_MAX:
            raise ValueError(f"it is larger than {ANSWER_BYTES_MAX >> 20} MiB")
        if time.monotonic() > ends:
            raise TimeoutError
        pieces.append(piece)
    return b"".join(pieces)
