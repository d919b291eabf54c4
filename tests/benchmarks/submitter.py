"""A client of its own that submits jobs one by one: submitter.py ADDRESS CONCURRENCY SECONDS.

Prints a JSON object. In another process than the harness, so that neither waits for the other's interpreter.
"""

import asyncio
import json
import sys
import time

import grpc.aio
from measure import MS_PER_S, spread
from node import job

from scheduler.v1 import job_service_pb2, job_service_pb2_grpc

CALL_S_MAX = 30.0
WARM_UP_CALLS = 20


async def submit(address: str, concurrency: int, seconds: float) -> dict[str, object]:
    """Keep so many submissions in flight for so long; returns the figures."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        for _ in range(WARM_UP_CALLS):
            await stub.ListJobs(job_service_pb2.ListJobsRequest(page_size=1), timeout=CALL_S_MAX)
        latencies: list[float] = []
        own, begun_s = time.process_time(), time.perf_counter()
        end_s = begun_s + seconds

        async def go_on(client: int) -> None:
            number = 0
            while (sent_s := time.perf_counter()) < end_s:
                number += 1
                request = job_service_pb2.SubmitJobRequest(
                    spec=job(["/bin/true"]), request_id=f"{client}-{number}"
                )
                await stub.SubmitJob(request, timeout=CALL_S_MAX)
                latencies.append(MS_PER_S * (time.perf_counter() - sent_s))

        async with asyncio.TaskGroup() as clients:
            for client in range(concurrency):
                clients.create_task(go_on(client))
        took_s = time.perf_counter() - begun_s
        own = time.process_time() - own
    return {
        "per_s": round(len(latencies) / took_s, 1),
        "submit_to_acknowledged_ms": spread(latencies),
        "jobs": len(latencies),
        "client_cpu_ms_per_operation": round(MS_PER_S * own / len(latencies), 3),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(submit(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))))
