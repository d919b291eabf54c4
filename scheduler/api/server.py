"""The gRPC server: services, health, reflection, listeners, limits."""

import os
import socket
import stat
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from scheduler.api.job_service import JobService
from scheduler.api.node_service import NodeService
from scheduler.api.power_service import PowerService
from scheduler.api.rpc import Decoding
from scheduler.api.usage_service import UsageService
from scheduler.errors import NodeError
from scheduler.model.settings import ServerConfig
from scheduler.v1 import (
    job_service_pb2,
    job_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    power_service_pb2,
    power_service_pb2_grpc,
    usage_service_pb2,
    usage_service_pb2_grpc,
)

# Clients that ping faster than this are sent away; gRPC's own bound of 300 s breaks idle watches.
PING_INTERVAL_MS_MIN = 20_000
STOP_GRACE_S = 1.0

_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (job_service_pb2, "JobService"),
        (node_service_pb2, "NodeService"),
        (power_service_pb2, "PowerService"),
        (usage_service_pb2, "UsageService"),
    )
)


class Server:
    """All that clients reach over gRPC."""

    def __init__(
        self,
        config: ServerConfig,
        listen: tuple[str, ...],
        jobs: JobService,
        node: NodeService,
        power: PowerService,
        usage: UsageService,
    ) -> None:
        self._config = config
        self._listen = listen
        self._server = grpc.aio.server(
            interceptors=(Decoding(),),
            options=(
                ("grpc.max_receive_message_length", config.message_bytes_max),
                ("grpc.max_send_message_length", config.message_bytes_max),
                ("grpc.max_concurrent_streams", config.connection_streams_max),
                ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN),
                ("grpc.so_reuseport", 0),
            ),
            maximum_concurrent_rpcs=config.concurrent_rpcs_max,
        )
        job_service_pb2_grpc.add_JobServiceServicer_to_server(jobs, self._server)
        node_service_pb2_grpc.add_NodeServiceServicer_to_server(node, self._server)
        power_service_pb2_grpc.add_PowerServiceServicer_to_server(power, self._server)
        usage_service_pb2_grpc.add_UsageServiceServicer_to_server(usage, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self._sockets: list[tuple[Path, int]] = []

    async def start(self) -> tuple[str, ...]:
        """Listen and serve; returns the addresses in use (port 0 takes any).

        Raises:
            NodeError: An address can't be had.
        """
        bound = tuple(self._bind(address) for address in self._listen)
        await self._server.start()
        for name in ("", *_NAMES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def stop(self) -> None:
        """Refuse new calls, end the streams, take the sockets away."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(STOP_GRACE_S)
        for path, inode in self._sockets:
            if path.exists() and path.stat().st_ino == inode:
                path.unlink()

    def _bind(self, address: str) -> str:
        if not address.startswith("unix:"):
            try:
                port = self._server.add_insecure_port(address)
            except RuntimeError as error:
                raise NodeError(f"server.listen {address} can't be had; choose another address") from error
            return f"{address.rpartition(':')[0]}:{port}"
        path = Path(address.removeprefix("unix://").removeprefix("unix:"))
        _clear(path, address)
        before = os.umask(0o777 & ~self._config.socket_mode)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise NodeError(
                f"server.listen {address} can't be had; is the directory there and writable, "
                "and the path shorter than 108 bytes?"
            ) from error
        finally:
            os.umask(before)
        path.chmod(self._config.socket_mode)
        self._sockets.append((path, path.stat().st_ino))
        return f"unix://{path}"


def _clear(path: Path, address: str) -> None:
    """Take a dead daemon's socket away; refuse where somebody listens or where it is no socket."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    except OSError as error:
        raise NodeError(f"server.listen {address}: {error.strerror}") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise NodeError(f"server.listen {address}: {path} is there and is no socket; move it away")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise NodeError(
        f"server.listen {address}: another daemon listens there; stop it or choose another address"
    )
