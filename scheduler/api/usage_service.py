"""UsageService: who used what, over gRPC."""

import base64
import binascii

from scheduler.api import convert
from scheduler.api.job_service import page_size
from scheduler.api.rpc import Context, unary
from scheduler.control.loop import Controller
from scheduler.errors import FieldViolation, InvalidRequest
from scheduler.v1 import usage_service_pb2, usage_service_pb2_grpc

_COLUMNS = {
    usage_service_pb2.USAGE_GROUP_UNSPECIFIED: "class",
    usage_service_pb2.USAGE_GROUP_JOB: "job_id",
    usage_service_pb2.USAGE_GROUP_TENANT: "tenant",
    usage_service_pb2.USAGE_GROUP_CLASS: "class",
    usage_service_pb2.USAGE_GROUP_GPU: "uuid",
}
# Beyond any time that a booking can have.
_FOREVER_S = 1e12


class UsageService(usage_service_pb2_grpc.UsageServiceServicer):
    """Sums of the bookings in the journal."""

    def __init__(self, controller: Controller) -> None:
        self._control = controller
        self.meters = controller.meters

    @unary
    async def ListUsage(
        self, request: usage_service_pb2.ListUsageRequest, context: Context
    ) -> usage_service_pb2.ListUsageResponse:
        column = _COLUMNS.get(request.group_by)
        if column is None:
            raise InvalidRequest(FieldViolation("group_by", "is unknown; give JOB, TENANT, CLASS or GPU"))
        size = page_size(request.page_size)
        start_s = convert.seconds(request.start) if request.HasField("start") else 0.0
        end_s = convert.seconds(request.end) if request.HasField("end") else _FOREVER_S
        if end_s <= start_s:
            raise InvalidRequest(FieldViolation("end", "is not after start; give a later moment"))
        after = _key(request.page_token)
        rows = self._control.effects.journal.usage(column, start_s, end_s, after, size + 1)
        token = (
            base64.urlsafe_b64encode(b"k" + rows[size - 1].key.encode()).decode() if len(rows) > size else ""
        )
        return usage_service_pb2.ListUsageResponse(
            usage=[convert.usage(row) for row in rows[:size]], next_page_token=token
        )


def _key(token: str) -> str | None:
    """The key behind which a page begins; None for the first page."""
    if not token:
        return None
    try:
        raw = base64.b64decode(token, altchars=b"-_", validate=True)
        if raw[:1] != b"k":
            raise ValueError
        return raw[1:].decode()
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            FieldViolation("page_token", "is not one of ours; give next_page_token of the page before")
        ) from None
