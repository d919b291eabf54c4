"""What a refused call says: its code, its words, and the fields that it names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused call."""

    code: grpc.StatusCode
    message: str
    fields: dict[str, str]  # descriptions by the path of the field
    reason: str  # of ErrorInfo


def refusal(call: Callable[[], Any]) -> Refusal:
    """Make a call that must be refused; returns how it was."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return told(caught.value)


def told(error: Any) -> Refusal:
    """What an error says."""
    fields: dict[str, str] = {}
    reason = ""
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if packed:
        for detail in status_pb2.Status.FromString(packed).details:
            bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
            if detail.Unpack(bad):
                fields |= {v.field: v.description for v in bad.field_violations}
            elif detail.Unpack(info):
                reason = info.reason
    return Refusal(error.code(), error.details() or "", fields, reason)
