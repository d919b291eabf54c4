"""Protobuf messages and gRPC services, generated from proto/scheduler/v1 when the package is built."""
