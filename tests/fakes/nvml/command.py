"""The command `fake-nvml`: makes a fake driver in a directory and changes it while others read it.

python -m tests.fakes.nvml.command DIR new --gpus 4 --profile A100 --live
eval "$(python -m tests.fakes.nvml.command DIR env)"; nvitop -1
python -m tests.fakes.nvml.command DIR load 0 0.8
"""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from tests.fakes.nvml.fake import ANY_GPU, GPU_FIGURES, GPU_INPUTS, MIB, FakeNvml
from tests.fakes.nvml.profiles import ABSENT, LIVE, PROFILES

WORDS = {"absent": ABSENT, "live": LIVE}
DRIVER = {
    "load": FakeNvml.load_driver,
    "unload": FakeNvml.unload_driver,
    "upgrade": FakeNvml.upgrade_driver,
    "hide": FakeNvml.hide_library,
    "show": FakeNvml.show_library,
}


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fake-nvml", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], object], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text)
        made.set_defaults(run=run)
        return made

    new = command("new", _new, "make a driver")
    new.add_argument("--gpus", type=int, default=1)
    new.add_argument("--profile", choices=PROFILES, default="H100")
    new.add_argument("--live", action="store_true", help="power, energy, clocks follow from load and limit")
    new.add_argument("--without", nargs="*", default=(), help="functions that its library lacks")
    command("env", _env, "print what makes a shell see it")
    one = command("set", _set, "set figures of a GPU: power_instant_mw=300000 energy_mj=absent lost=1")
    one.add_argument("gpu", type=int)
    one.add_argument("figures", nargs="+", metavar="FIGURE=VALUE")
    load = command("load", lambda o: FakeNvml.opened(o.directory).load(o.gpu, o.ratio), "let a GPU work")
    load.add_argument("gpu", type=int)
    load.add_argument("ratio", type=float)
    processes = command("processes", _processes, "who is on a GPU, for all who were")
    processes.add_argument("gpu", type=int)
    processes.add_argument("--kind", choices=("compute", "graphics", "mps"), default="compute")
    processes.add_argument("processes", nargs="*", metavar="PID:MIB")
    xid = command("xid", lambda o: FakeNvml.opened(o.directory).xid(o.gpu, o.number), "report an XID")
    xid.add_argument("gpu", type=int)
    xid.add_argument("number", type=int)
    mig = command(
        "mig", lambda o: FakeNvml.opened(o.directory).gpus[o.gpu].partition(*o.slices), "cut into instances"
    )
    mig.add_argument("gpu", type=int)
    mig.add_argument("slices", type=int, nargs="*", choices=(1, 2, 3, 4, 7), help="sevenths of each")
    rule = command("rule", _rule, "bend a call (* = every call)")
    rule.add_argument("function")
    rule.add_argument("--gpu", type=int, default=ANY_GPU)
    rule.add_argument("--code", type=int, default=0)
    rule.add_argument("--delay-s", type=float, default=0.0)
    rule.add_argument("--hang", action="store_true")
    command("clear", lambda o: FakeNvml.opened(o.directory).clear_rules(), "bend no call any more")
    driver = command("driver", lambda o: DRIVER[o.what](FakeNvml.opened(o.directory)), "load, unload, ...")
    driver.add_argument("what", choices=DRIVER)
    return parser


def _new(options: argparse.Namespace) -> None:
    options.directory.mkdir(parents=True, exist_ok=True)
    FakeNvml(options.directory, options.gpus, options.without, options.profile, is_live=options.live)


def _env(options: argparse.Namespace) -> None:
    environment = FakeNvml.opened(options.directory.resolve()).environment()
    for name in ("LD_LIBRARY_PATH", "WATTSHIFT_FAKE_NVML_STATE"):
        print(f"export {name}={shlex.quote(environment[name])}")


def _set(options: argparse.Namespace) -> None:
    fake = FakeNvml.opened(options.directory)
    for figure in options.figures:
        name, _, value = figure.partition("=")
        if name not in (*GPU_FIGURES, *GPU_INPUTS, "lost", "deaf"):
            raise SystemExit(
                f"fake-nvml: no figure {name!r}; there are {', '.join(GPU_FIGURES + GPU_INPUTS)}"
            )
        setattr(fake.gpus[options.gpu], name, WORDS[value] if value in WORDS else int(value))
    fake.draw_changed(options.gpu)


def _processes(options: argparse.Namespace) -> None:
    pairs = [tuple(map(int, one.split(":"))) for one in options.processes]
    processes = [(pid, mib * MIB) for pid, mib in pairs]
    FakeNvml.opened(options.directory).gpus[options.gpu].set_processes(processes, options.kind)


def _rule(options: argparse.Namespace) -> None:
    fake = FakeNvml.opened(options.directory)
    fake.rule(options.function, options.gpu, options.code, options.delay_s, options.hang)


if __name__ == "__main__":
    main()
