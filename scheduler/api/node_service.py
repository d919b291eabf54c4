"""NodeService: the node and its GPUs over gRPC."""

import asyncio
from collections.abc import AsyncIterator

from scheduler.api import convert, submission
from scheduler.api.rpc import Context, stream, unary
from scheduler.control import inbox
from scheduler.control.loop import Controller
from scheduler.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc

# A watch of the node sends at most this often: a busy node changes thousands of times a second.
WATCH_PERIOD_S = 1.0


class NodeService(node_service_pb2_grpc.NodeServiceServicer):
    """Turns messages into commands and looks; decides nothing."""

    def __init__(self, controller: Controller, *, simulated: bool, started_s: float) -> None:
        self._control = controller
        self._simulated = simulated
        self._started_s = started_s
        self.meters = controller.meters

    @unary
    async def GetNode(
        self, request: node_service_pb2.GetNodeRequest, context: Context
    ) -> node_service_pb2.GetNodeResponse:
        return node_service_pb2.GetNodeResponse(node=self._node())

    @stream
    async def WatchNode(
        self, request: node_service_pb2.WatchNodeRequest, context: Context
    ) -> AsyncIterator[node_service_pb2.WatchNodeResponse]:
        changed = self._control.watchers.watch_node()
        try:
            while True:
                yield node_service_pb2.WatchNodeResponse(node=self._node())
                await asyncio.sleep(WATCH_PERIOD_S)
                await changed.wait()
                changed.clear()
        finally:
            self._control.watchers.leave(changed)

    @unary
    async def CordonGpu(
        self, request: node_service_pb2.CordonGpuRequest, context: Context
    ) -> node_service_pb2.CordonGpuResponse:
        found = submission.Violations()
        detail = found.text("reason", request.reason, submission.NAME_CHARS_MAX)
        found.check()
        uuid = await self._control.ask(inbox.Cordon(request.gpu, detail))
        return node_service_pb2.CordonGpuResponse(gpu=self._gpu(uuid))

    @unary
    async def UncordonGpu(
        self, request: node_service_pb2.UncordonGpuRequest, context: Context
    ) -> node_service_pb2.UncordonGpuResponse:
        uuid = await self._control.ask(inbox.Uncordon(request.gpu))
        return node_service_pb2.UncordonGpuResponse(gpu=self._gpu(uuid))

    @unary
    async def DrainNode(
        self, request: node_service_pb2.DrainNodeRequest, context: Context
    ) -> node_service_pb2.DrainNodeResponse:
        await self._control.ask(inbox.Drain(request.stop_jobs))
        return node_service_pb2.DrainNodeResponse(node=self._node())

    @unary
    async def UndrainNode(
        self, request: node_service_pb2.UndrainNodeRequest, context: Context
    ) -> node_service_pb2.UndrainNodeResponse:
        await self._control.ask(inbox.Undrain())
        return node_service_pb2.UndrainNodeResponse(node=self._node())

    @unary
    async def ReleaseNode(
        self, request: node_service_pb2.ReleaseNodeRequest, context: Context
    ) -> node_service_pb2.ReleaseNodeResponse:
        await self._control.ask(inbox.Drain(stop_jobs=False, release=True))
        return node_service_pb2.ReleaseNodeResponse(node=self._node())

    def _gpu(self, uuid: str) -> node_pb2.Gpu:
        views = self._control.board.views(self._control.effects.clock.now_s())
        return next(convert.gpu(view) for view in views if view.identity.uuid == uuid)

    def _node(self) -> node_pb2.Node:
        control = self._control
        drain = control.ledger.drain
        return node_pb2.Node(
            name=control.config.node.name,
            version=control.site.version,
            started_at=convert.timestamp(self._started_s),
            gpus=[convert.gpu(view) for view in control.board.views(control.effects.clock.now_s())],
            cpus=control.board.sizes[0].cpus,
            memory_mib=control.board.sizes[0].memory_mib,
            draining=drain is not None,
            released=control.board.released,
            simulated=self._simulated,
            driver_version=control.board.driver_version,
            pending_jobs=control.ledger.pending,
            live_jobs=len(control.ledger.live),
            problems=[control.problems[kind] for kind in sorted(control.problems)],
            limitations=control.abilities.limitations,
            revision=control.effects.journal.head,
        )
