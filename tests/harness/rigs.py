"""Miners' APIs on loopback: small real servers that answer as T-Rex, lolMiner, Rigel, XMRig and cgminer do.

What they answer follows the miners' documents, with the fields around those that are read; what they say can
be changed while they run, and they can misbehave.
"""

import contextlib
import json
import socket
import socketserver
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self

from scheduler.model.mining import MinerApi

PIECE = b"x" * (1 << 20)
GIB_IN_PIECES = 1024


@dataclass
class Rig:
    """A miner's API. `mode`: good, html, 500, hangs, dribbles, huge, huge-length, garbage, closes."""

    api: MinerApi
    port: int = 0
    hashrate_hs: float | None = 30e6
    accepted: int = 0
    refused: int = 0
    unit: str = "Mh/s"  # of lolMiner
    algorithm: str = "kawpow"
    token: str = ""
    mode: str = "good"
    overrides: dict[str, Any] = field(default_factory=dict)  # of the answer's top level
    asked: list[bytes] = field(default_factory=list)
    _server: socketserver.ThreadingTCPServer | None = None

    def __enter__(self) -> Self:
        rig = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    rig.serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def serve(self, connection: socket.socket) -> None:
        """Answer one request."""
        request = connection.recv(4096)
        self.asked.append(request)
        is_http = self.api is not MinerApi.CGMINER
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" if is_http else b""
        match self.mode:
            case "hangs":
                connection.recv(1)  # until the other side has enough of it
            case "closes":
                return
            case "html":
                connection.sendall(head + (b"\r\n" if is_http else b"") + b"<html>No</html>")
            case "500":
                connection.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
            case "garbage":
                connection.sendall(b"\x00\xff\x80 what? \r\n\r\n")
            case "dribbles":
                for byte in head + b"\r\n":
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            case "huge":
                connection.sendall(head + (b"\r\n" if is_http else b""))
                for _ in range(GIB_IN_PIECES):
                    connection.sendall(PIECE)
            case "huge-length":
                connection.sendall(head + b"Content-Length: 1000000000\r\n\r\n{")
                connection.recv(1)
            case "chunked":
                body = json.dumps(self.answer()).encode()
                cut = [body[:7], body[7:]]
                chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut)
                connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
            case _:
                self._good(connection, request, head)

    def _good(self, connection: socket.socket, request: bytes, head: bytes) -> None:
        body = json.dumps(self.answer()).encode()
        if self.api is MinerApi.CGMINER:
            assert json.loads(request) == {"command": "summary"}
            connection.sendall(body + b"\0")
            return
        if self.token and f"authorization: bearer {self.token}".encode() not in request.lower():
            connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
            return
        path = {"rigel": b"/stat", "xmrig": b"/2/summary"}.get(self.api.value, b"/summary")
        assert request.split(b" ")[1] == path
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.recv(1)  # as some do, it leaves the connection open

    def answer(self) -> dict[str, Any]:
        """What it says."""
        made = {
            MinerApi.T_REX: self._t_rex,
            MinerApi.LOLMINER: self._lolminer,
            MinerApi.RIGEL: self._rigel,
            MinerApi.XMRIG: self._xmrig,
            MinerApi.CGMINER: self._cgminer,
        }[self.api]()
        return made | self.overrides

    def _t_rex(self) -> dict[str, Any]:
        gpu = {
            "device_id": 0,
            "gpu_id": 0,
            "hashrate": self.hashrate_hs,
            "name": "RTX 3090",
            "power": 290,
            "shares": {"accepted_count": self.accepted, "rejected_count": self.refused},
        }
        return {
            "accepted_count": self.accepted,
            "active_pool": {"difficulty": "4.29 G", "ping": 41, "url": "stratum+tcp://pool.example:3333"},
            "algorithm": self.algorithm,
            "driver": "550.54.14",
            "gpu_total": 1,
            "gpus": [gpu],
            "hashrate": self.hashrate_hs,
            "hashrate_minute": self.hashrate_hs,
            "invalid_count": 0,
            "name": "t-rex",
            "rejected_count": self.refused,
            "solved_count": 0,
            "success": 1,
            "uptime": 612,
            "version": "0.26.8",
        }

    def _lolminer(self) -> dict[str, Any]:
        factor = {"h/s": 1.0, "kh/s": 1e3, "Mh/s": 1e6, "Gh/s": 1e9}.get(self.unit, 1.0)
        total = None if self.hashrate_hs is None else self.hashrate_hs / factor
        return {
            "Software": "lolMiner 1.88",
            "Session": {"Startup": 1700000000, "Uptime": 612, "Last_Update": 1700000612},
            "Num_Workers": 1,
            "Workers": [{"Index": 0, "Name": "RTX 3090", "Power": 290.1}],
            "Num_Algorithms": 1,
            "Algorithms": [
                {
                    "Algorithm": "Ethash",
                    "Pool": "pool.example:3333",
                    "Performance_Unit": self.unit,
                    "Performance_Factor": factor,
                    "Total_Performance": total,
                    "Total_Accepted": self.accepted,
                    "Total_Rejected": self.refused,
                    "Total_Stales": 0,
                    "Total_Errors": 0,
                }
            ],
        }

    def _rigel(self) -> dict[str, Any]:
        return {
            "name": "rigel",
            "version": "1.19.1",
            "algorithm": self.algorithm,
            "uptime": 612,
            "hashrate": {self.algorithm: self.hashrate_hs},
            "solution_stat": {
                self.algorithm: {"accepted": self.accepted, "rejected": self.refused, "invalid": 0}
            },
            "power_usage": 290,
            "devices": [{"id": 0, "selected": True, "name": "RTX 3090"}],
        }

    def _xmrig(self) -> dict[str, Any]:
        return {
            "id": "6226e3sd0cd1a6es",
            "uptime": 612,
            "restricted": True,
            "results": {
                "diff_current": 100001,
                "shares_good": self.accepted,
                "shares_total": self.accepted + self.refused,
                "avg_time": 31,
            },
            "algo": "rx/0",
            "connection": {"pool": "pool.example:3333", "accepted": self.accepted, "rejected": self.refused},
            "version": "6.21.0",
            "hashrate": {"total": [self.hashrate_hs, self.hashrate_hs, None], "highest": self.hashrate_hs},
        }

    def _cgminer(self) -> dict[str, Any]:
        rate = None if self.hashrate_hs is None else self.hashrate_hs / 1e6
        summary = {
            "Elapsed": 612,
            "MHS av": rate,
            "MHS 5s": rate,
            "Found Blocks": 0,
            "Accepted": self.accepted,
            "Rejected": self.refused,
            "Stale": 0,
            "Difficulty Accepted": 65536.0 * self.accepted,
        }
        status = {"STATUS": "S", "When": 1700000612, "Code": 11, "Msg": "Summary"}
        return {"STATUS": [status], "SUMMARY": [summary], "id": 1}
