"""Compiles proto/scheduler/v1/*.proto into scheduler/v1 whenever the package is built.

The generated code is never committed: it would differ by generator, and nobody reviews it. `make proto` runs
this file directly, which is quicker than a build.
"""

import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE_DIR = "scheduler/v1"
GENERATED_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


class ProtoBuildHook(BuildHookInterface[Any]):
    """Generates the protobuf modules before hatchling collects the package's files."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (hatchling's signature)
        """Compile in the source tree, so that editable installs and wheels find the same files."""
        compile_protos(Path(self.root))


def compile_protos(root: Path) -> tuple[Path, ...]:
    """Return the generated files, sorted, after making them agree with the protos under `root`.

    A file whose content is unchanged is not touched, and one whose proto is gone is removed.

    Raises:
        RuntimeError: protoc refused the files; it has already said why on stderr.
    """
    target_dir = root / SOURCE_DIR
    target_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wattshift-proto-") as scratch:
        _run_protoc(root / "proto", Path(scratch))
        fresh = {path.name: path.read_bytes() for path in (Path(scratch) / SOURCE_DIR).glob("*")}
    for pattern in GENERATED_PATTERNS:
        for stale in target_dir.glob(pattern):
            if stale.name not in fresh:
                stale.unlink()
    for name, content in fresh.items():
        path = target_dir / name
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
    return tuple(sorted(target_dir / name for name in fresh))


def _run_protoc(proto_dir: Path, out_dir: Path) -> None:
    # Imported here so that the file can be read, and linted, without the generator.
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(proto_dir)) for path in proto_dir.glob(f"{SOURCE_DIR}/*.proto"))
    if not sources:
        return
    well_known_types = resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"--proto_path={proto_dir}",
        f"--proto_path={well_known_types}",
        f"--python_out={out_dir}",
        f"--pyi_out={out_dir}",
        f"--grpc_python_out={out_dir}",
        *sources,
    ]
    status = protoc.main(arguments)
    if status != 0:
        raise RuntimeError(f"protoc exited with {status} for {', '.join(sources)}")


if __name__ == "__main__":
    generated = compile_protos(Path(__file__).resolve().parent.parent)
    sys.stdout.write(f"{len(generated)} files in {SOURCE_DIR} are up to date\n")
