"""What can never run on this node is refused when it is submitted, with the field that rules it out."""

from scheduler.control.board import GpuBoard
from scheduler.errors import FieldViolation, Infeasible
from scheduler.model.gpus import model_matches
from scheduler.model.jobs import JobSpec


def check_feasible(spec: JobSpec, board: GpuBoard, prefix: str) -> None:
    """Refuse a job that this node could not run even if it were empty.

    Where no GPU is known (no driver yet) nothing can be said of GPUs: the job may wait.

    Raises:
        Infeasible: Fields rule it out; each is named, under `prefix`.
    """
    found: list[FieldViolation] = []
    size = board.sizes[0]
    if spec.cpus > size.cpus:
        found.append(FieldViolation(prefix + "cpus", f"is {spec.cpus}; this node has {size.cpus} for jobs"))
    if spec.memory_mib > size.memory_mib:
        found.append(
            FieldViolation(
                prefix + "memory_mib", f"is {spec.memory_mib}; this node has {size.memory_mib} MiB for jobs"
            )
        )
    gpus = board.identities
    if spec.gpus and (gpus or "driver" not in board.errors):
        fitting = [
            g for g in gpus if not spec.gpu_models or any(model_matches(m, g.model) for m in spec.gpu_models)
        ]
        roomy = [g for g in fitting if board.bookable_mib(g) >= spec.gpu_memory_mib]
        # A CUDA program sees one MIG instance and nothing beside it.
        counted = [g for g in roomy if spec.gpus == 1 or not g.parent_uuid]
        models = ", ".join(sorted({g.model for g in gpus})) or "none"
        if spec.gpu_models and not fitting:
            wanted = ", ".join(spec.gpu_models)
            found.append(
                FieldViolation(
                    prefix + "gpu_models", f"no GPU of this node matches {wanted}; it has: {models}"
                )
            )
        elif spec.gpu_memory_mib and fitting and not roomy:
            most = max(board.bookable_mib(g) for g in fitting)
            found.append(
                FieldViolation(
                    prefix + "gpu_memory_mib",
                    f"is {spec.gpu_memory_mib}; the largest fitting GPU has {most} MiB for jobs",
                )
            )
        elif spec.gpus > len(counted):
            if len(counted) < len(roomy):
                text = (
                    f"is {spec.gpus}; this node has {len(counted)} whole GPUs that fit, and a job of several "
                    "gets no MIG instances: ask for one, or submit a job for each"
                )
            else:
                text = f"is {spec.gpus}; this node has {len(roomy)} GPUs that fit ({models})"
            found.append(FieldViolation(prefix + "gpus", text))
    if found:
        raise Infeasible(*found)
