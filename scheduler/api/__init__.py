"""protobuf, gRPC and Prometheus at the border."""
