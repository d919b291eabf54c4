"""Explanations and previews in words."""

from scheduler.control.loop import Controller
from scheduler.model.jobs import Job, JobSpec
from scheduler.v1 import job_pb2, job_service_pb2


def preview(control: Controller, spec: JobSpec) -> job_service_pb2.PreviewJobResponse:
    """What would happen if the job were submitted now."""
    return job_service_pb2.PreviewJobResponse()


def explain(control: Controller, job: Job, message: job_pb2.Job) -> job_service_pb2.ExplainJobResponse:
    """Why a job is where it is."""
    return job_service_pb2.ExplainJobResponse(job=message)
