"""`wattshift.toml`: what it says is what is; what is wrong is named with its file, line, key and remedy."""

import socket
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler import config
from scheduler.config import rules
from scheduler.errors import ConfigError
from scheduler.model.jobs import JobClass, RestartRule
from scheduler.model.mining import Miner, MinerApi
from scheduler.model.policy import CLASS_DEFAULTS, ClassDefaults, Order, Policy
from scheduler.model.settings import (
    Config,
    ForeignAction,
    ForeignConfig,
    ForeignRule,
    JobsConfig,
    NodeConfig,
    SamplingConfig,
    ServerConfig,
    StandingJob,
    StateConfig,
    is_loopback,
    split_host_port,
)

HERE = Config(node=config.load(None).node)

MINER = '[[standing_jobs]]\nname = "m"\ncommand = ["x"]\n'


def parse(text: str) -> Config:
    return config.parse(text, "w.toml")


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    return str(raised.value).splitlines()


def problem(text: str) -> str:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


# What is read ------------------------------------------------------------------------------------


def test_no_file_is_all_defaults_and_the_host_name() -> None:
    assert HERE.node.name == socket.gethostname()
    assert config.load(None) == Config(node=HERE.node)


def test_a_class_keeps_its_other_defaults() -> None:
    classes = parse("[classes.mining]\ngrace_s = 5").policy.classes
    assert classes[JobClass.MINING].grace_s == 5.0
    assert classes[JobClass.MINING].value_usd_per_gpu_hour == 0.05
    assert classes[JobClass.BATCH] == CLASS_DEFAULTS[JobClass.BATCH]


def test_words_numbers_and_paths_become_values() -> None:
    loaded = parse('[policy]\norder = "value"\nhysteresis_ratio = 1\n[state]\ndirectory = "/srv/w"\n')
    assert loaded.policy.order is Order.VALUE
    assert isinstance(loaded.policy.hysteresis_ratio, float)
    assert loaded.state.directory == Path("/srv/w")


def test_a_standing_job_takes_from_its_class_what_it_does_not_say() -> None:
    loaded = parse(MINER + "gpu_memory_mib = 4096\n[classes.mining]\nvalue_usd_per_gpu_hour = 0.07\ncpus = 2")
    spec = loaded.standing_jobs[0].spec(loaded.policy)
    assert (spec.name, spec.command, spec.gpus, spec.gpu_share_milli) == ("m", ("x",), 1, 1000)
    assert (spec.value_microusd_per_gpu_hour, spec.cpus, spec.gpu_memory_mib) == (70_000, 2, 4096)
    assert (spec.grace_s, spec.preemptible, spec.restart) == (2.0, True, RestartRule.ALWAYS)


def test_a_standing_job_may_say_zero() -> None:
    loaded = parse(MINER + "value_usd_per_gpu_hour = 0\ngrace_s = 0")
    spec = loaded.standing_jobs[0].spec(loaded.policy)
    assert (spec.value_microusd_per_gpu_hour, spec.grace_s) == (0, 0.0)


def test_windows_line_ends_are_read_alike() -> None:
    assert parse("[sampling]\r\nperiod_s = 2\r\n").sampling.period_s == 2.0
    assert problem("[sampling]\r\n\r\nperiod = 2\r\n").startswith("w.toml:3: sampling.period: unknown key")


# Files that are no configuration -------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: can't be read: No such file or directory"):
        config.load(tmp_path / "nowhere.toml")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        config.load(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_bytes(b"[node]\nname = '\xff'\n")
    with pytest.raises(ConfigError, match=r"w.toml:2: is not UTF-8"):
        config.load(path)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_bytes(b"#" * (config.CONFIG_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="is larger than 1048576 bytes"):
        config.load(path)


def test_a_syntax_error_has_its_line_and_column() -> None:
    assert problem("[node]\nname = \n") == "w.toml:2, column 8: not TOML: Invalid value"
    assert problem('[node]\nname = "x') == "w.toml:2: not TOML: Unterminated string"


def test_a_key_that_stands_twice() -> None:
    assert problem("[policy]\nbackfill = true\nbackfill = true\n").startswith("w.toml:3")


# Keys that are wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("polcy = 1", "w.toml:1: polcy: unknown key; did you mean policy?"),
        ("\n[server]\nlistn = []", "w.toml:3: server.listn: unknown key; did you mean listen?"),
        ("[policy.classes.mining]\n", "w.toml:1: policy.classes: unknown key; known here: order, "),
        ("[classes.minig]\n", "w.toml:1: classes.minig: unknown key; did you mean mining?"),
        (
            "[classes]\nmining = { grace = 1 }",
            "w.toml:2: classes.mining.grace: unknown key; did you mean grace_s?",
        ),
        (MINER + "\nclas = 3", "w.toml:5: standing_jobs[0].clas: unknown key; did you mean class?"),
        (
            MINER + "\njob_class = 'mining'",
            "w.toml:5: standing_jobs[0].job_class: unknown key; did you mean class?",
        ),
        (
            MINER + MINER.replace('"m"', '"n"') + "x = 1",
            "w.toml:7: standing_jobs[1].x: unknown key; known here: name",
        ),
        ("node = 3", "w.toml:1: node: must be a table, [node], is 3"),
        ("classes = 3", "w.toml:1: classes: must be tables such as [classes.mining], is 3"),
        (
            "[standing_jobs]\n",
            "w.toml:1: standing_jobs: must be an array of tables, [[standing_jobs]], is a table",
        ),
        ("foreign.rules = [3]", "w.toml:1: foreign.rules[0]: must be a table, [foreign.rules[0]], is 3"),
        (
            "[[standing_jobs]]\nname = 'm'",
            "w.toml:1: standing_jobs[0].command: is missing; must be an array of",
        ),
        (
            "[[foreign.rules]]\nuser = 'u'",
            "w.toml:1: foreign.rules[0].action: is missing; must be one of protect, i",
        ),
    ],
)
def test_a_key_that_does_not_exist_or_is_missing(text: str, expected: str) -> None:
    assert problem(text).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node.cpus = 0", "node.cpus: must be a whole number from 1 to 65536, is 0"),
        ("node.cpus = 2.5", "node.cpus: must be a whole number from 1 to 65536, is 2.5"),
        ("node.cpus = true", "node.cpus: must be a whole number from 1 to 65536, is true"),
        ("node.cpus = '4'", 'node.cpus: must be a whole number from 1 to 65536, is "4"'),
        ("sampling.period_s = nan", "sampling.period_s: must be a number from 0.05 to 60, is nan"),
        ("sampling.period_s = inf", "sampling.period_s: must be a number from 0.05 to 60, is inf"),
        ("sampling.period_s = -1", "sampling.period_s: must be a number from 0.05 to 60, is -1"),
        ("policy.order = 'rank'", 'policy.order: must be one of class, value, is "rank"'),
        ("policy.order = 1", "policy.order: must be one of class, value, is 1"),
        ("policy.backfill = 1", "policy.backfill: must be true or false, is 1"),
        ("foreign.default = 'kill'", 'foreign.default: must be one of protect, ignore, evict, is "kill"'),
        ("node.name = 3", "node.name: must be a string of at most 4096 characters, is 3"),
        ("state.directory = 3", "state.directory: must be a string of at most 4096 characters, is 3"),
        (
            "state.directory = 1979-05-27",
            "state.directory: must be a string of at most 4096 characters, is 1979-05",
        ),
        ("server.listen = 'x'", 'server.listen: must be an array of at most 1024 strings, is "x"'),
        ("server.listen = ['x', 3]", 'server.listen: must be an array of at most 1024 strings, is ["x", 3]'),
        (
            MINER + "class = 'x'",
            'standing_jobs[0].class: must be one of inference, training, batch, mining, is "x"',
        ),
        (
            MINER + "class = 3",
            "standing_jobs[0].class: must be one of inference, training, batch, mining, is 3",
        ),
        (
            MINER + "environment = { A = 1 }",
            "standing_jobs[0].environment: must be a table of at most 512 strings, ",
        ),
        (
            MINER + 'tenant = "a\\u0000b"',
            "standing_jobs[0].tenant: must be a string of at most 4096 characters, is ",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_or_size(text: str, expected: str) -> None:
    line = text.count("\n") + 1
    assert problem(text).startswith(f"w.toml:{line}: {expected}")


@given(st.sampled_from(sorted(rules.RANGES)), st.floats() | st.integers())
def test_a_number_out_of_its_range_is_never_taken(key: str, number: float) -> None:
    low, high = rules.RANGES[key]
    table, name = key.split(".")[0], key.split(".")[-1]
    above = {"standing_jobs": MINER, "classes": "[classes.mining]\n"}.get(table, f"[{table}]\n")
    try:
        parse(f"{above}{name} = {number}")
    except ConfigError:
        is_taken = False
    else:
        is_taken = True
    assert low <= number <= high or not is_taken


# Names that are a key of some table.
KNOWN = {"classes", "class", *rules.CLASS_KEYS} | {
    field.name
    for kind in (
        Config,
        NodeConfig,
        ServerConfig,
        StateConfig,
        JobsConfig,
        SamplingConfig,
        ForeignConfig,
        ForeignRule,
        StandingJob,
        Policy,
        ClassDefaults,
    )
    for field in fields(kind)
}

TABLES = st.sampled_from(
    ["", "[node]", "[server]", "[state]", "[jobs]", "[sampling]", "[policy]", "[foreign]", "[classes]"]
    + [f"[classes.{job_class.name.lower()}]" for job_class in JobClass]
    + ["[[foreign.rules]]\nuser = 'u'\naction = 'ignore'", MINER]
)


@given(
    TABLES,
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.sampled_from(["1", '"x"', "[]", "{}", "[[1], [{}]]"]),
)
def test_an_unknown_key_is_refused_wherever_it_stands(table: str, name: str, value: str) -> None:
    assume(name not in KNOWN)
    quoted = '"' + "".join(f"\\U{ord(character):08x}" for character in name) + '"'
    text = f"{table}\n{quoted} = {value}\n"
    line = text.count("\n")
    assert problem(text).startswith(f"w.toml:{line}: ")
    assert ": unknown key; " in problem(text)


def test_all_problems_are_named_in_the_order_of_their_lines() -> None:
    found = problems("[node]\ncpus = 0\n[policy]\nordr = 1\n[state]\nfree_mib_min = -1\n")
    assert [line.split(":")[1] for line in found] == ["2", "4", "6"]


def test_a_file_with_very_many_problems_is_cut_short() -> None:
    found = problems("\n".join(f"k{i} = 1" for i in range(30)))
    assert len(found) == config.PROBLEMS_SHOWN_MAX + 1
    assert found[-1] == "w.toml: and 10 more"


# Contradictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (
            "[sampling]\nperiod_s = 9",
            1,
            "sampling.processes_period_s: must be at least sampling.period_s (9.0 s)",
        ),
        (
            "[sampling]\nprocesses_period_s = 0.5",
            2,
            "sampling.processes_period_s: must be at least sampling.period_s",
        ),
        (
            "[policy]\nrestart_backoff_s = 400",
            2,
            "policy.restart_backoff_s: must be at most policy.restart_backoff_s_m",
        ),
        (
            "[policy]\npreemption_backoff_s_max = 0",
            1,
            "policy.preemption_backoff_s: must be at most policy.preemption_",
        ),
        (
            "[jobs]\ngrace_s_max = 20\n[classes.training]\ngrace_s = 19\n[classes.inference]\ngrace_s = 21",
            6,
            "classes.inference.grace_s: must be at most jobs.grace_s_max (20.0 s), is 21.0",
        ),
        (
            MINER + "grace_s = 3601",
            4,
            "standing_jobs[0].grace_s: must be at most jobs.grace_s_max (3600.0 s), is 3601",
        ),
        ("node.name = 'a b'", 1, "node.name: must be 1 to 253 letters"),
        ("state.directory = 'x'", 1, 'state.directory: must be an absolute path, is "x"'),
        (
            "jobs.user = 'no-such-user'",
            1,
            'jobs.user: no user "no-such-user" on this machine; make the user first',
        ),
        ("server.socket_mode = 0o666", 1, "server.socket_mode: must be 0o600 or 0o660, is 0o666"),
        ("server.listen = [\n'unix:///a',\n'unix:///a']", 3, 'server.listen[1]: "unix:///a" is listed twice'),
        (
            "server.listen = ['unix://a']",
            1,
            "server.listen[0]: must be unix:// and an absolute path of at most 107",
        ),
        (
            f"server.listen = ['unix:///{'a' * 107}']",
            1,
            "server.listen[0]: must be unix:// and an absolute path of at",
        ),
        ("server.listen = ['/run/x']", 1, "server.listen[0]: must be unix:///path or host:port"),
        (
            "server.listen = ['127.0.0.1:9000']",
            1,
            'server.listen[0]: "127.0.0.1:9000": every user of this machine',
        ),
        (
            "server.listen = ['10.0.0.1:9000']\nserver.insecure_loopback = true",
            1,
            'server.listen[0]: "10.0.0.1:9000" is not loopback: the API has no authentication',
        ),
        (
            "server.metrics_listen = '9477'",
            1,
            'server.metrics_listen: must be host:port, or "" for no metrics, is',
        ),
        (
            "server.metrics_listen = ':9477'",
            1,
            'server.metrics_listen: must be host:port, or "" for no metrics, is',
        ),
        (
            "server.metrics_listen = '0.0.0.0:9477'",
            1,
            'server.metrics_listen: "0.0.0.0:9477" is not loopback',
        ),
        ("[[foreign.rules]]\naction = 'evict'", 1, "foreign.rules[0]: must name a user, a command or both"),
        (
            "[[foreign.rules]]\naction = 'evict'\ncommand = '/bin/x'",
            3,
            "foreign.rules[0].command: must be the base",
        ),
        (
            "foreign.rules = [{user = 'x', action = 'evict'},\n{user = 'x', action = 'ignore'}]",
            2,
            "foreign.rules[1]: is never reached: foreign.rules[0] is about the same",
        ),
        (MINER + MINER, 5, 'standing_jobs[1].name: "m" is the name of standing_jobs[0] already'),
        (MINER.replace('"m"', '"a b"'), 2, "standing_jobs[0].name: must be 1 to 64 letters"),
        (MINER.replace('["x"]', "[]"), 3, "standing_jobs[0].command: must name a program"),
        (
            MINER + 'stop_command = [""]',
            4,
            "standing_jobs[0].stop_command: must name a program, or be left out",
        ),
        (
            MINER + 'working_directory = "x"',
            4,
            'standing_jobs[0].working_directory: must be an absolute path, is "x"',
        ),
        (MINER + 'gpu_models = [" "]', 4, "standing_jobs[0].gpu_models: must be words of GPU names"),
        (MINER + f'tenant = "{"x" * 65}"', 4, "standing_jobs[0].tenant: must be at most 64 characters"),
        (
            MINER + "class = 'inference'",
            4,
            "standing_jobs[0].class: inference is not preemptible (classes.inference.pr",
        ),
        (
            MINER + "[standing_jobs.environment]\nCUDA_VISIBLE_DEVICES = '0'",
            5,
            "standing_jobs[0].environment.CUDA_VISIBLE_DEVICES: is set by Wattshift for each job; remove it",
        ),
        (
            MINER + "environment = {WATTSHIFT_X = '0'}",
            4,
            "standing_jobs[0].environment.WATTSHIFT_X: is set by Wattshift",
        ),
        (
            MINER + "environment = {'A B' = '0'}",
            4,
            'standing_jobs[0].environment."A B": is no name of an environment',
        ),
        (
            "jobs.environment_bytes_max = 9\n" + MINER + "environment.ABCD = '1234'",
            5,
            "standing_jobs[0].environment: takes 10 bytes; jobs.environment_bytes_max is 9",
        ),
        (
            "\n" + "".join(MINER.replace('"m"', f'"m{i}"') for i in range(65)),
            2,
            "standing_jobs: must be at most 64, are 65",
        ),
    ],
)
def test_a_contradiction_is_refused(text: str, line: int, expected: str) -> None:
    assert problem(text).startswith(f"w.toml:{line}: {expected}")


def test_what_contradicts_nothing_is_taken() -> None:
    server = parse(
        """
        [server]
        listen = ["unix:///run/a", "localhost:0", "[::1]:9000"]
        insecure_loopback = true
        metrics_listen = "[::]:9477"
        metrics_beyond_loopback = true
        """
    ).server
    assert server.listen == ("unix:///run/a", "localhost:0", "[::1]:9000")
    assert parse("server.metrics_listen = ''").server.metrics_listen == ""
    assert parse("jobs.user = 'root'").jobs.user == "root"
    assert parse(MINER + "class = 'inference'\n[classes.inference]\npreemptible = true").standing_jobs


# The command line --------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file() -> None:
    base = parse("server.listen = ['unix:///run/a']\nserver.insecure_loopback = true")
    changed = config.overridden(
        base, listen=("127.0.0.1:0",), metrics_listen="127.0.0.1:0", state_directory=Path("here")
    )
    assert (changed.server.listen, changed.server.metrics_listen) == (("127.0.0.1:0",), "127.0.0.1:0")
    assert changed.state.directory == Path("here").absolute()
    assert config.overridden(base) == base


def test_the_command_line_is_checked_like_the_file() -> None:
    with pytest.raises(ConfigError, match=r"--listen: .*every user of this machine"):
        config.overridden(HERE, listen=("127.0.0.1:0",))
    with pytest.raises(ConfigError, match=r"--metrics-listen: .*is not loopback"):
        config.overridden(HERE, metrics_listen="0.0.0.0:1")


# Foreign processes and addresses -----------------------------------------------------------------


def test_the_first_rule_that_fits_says_what_is_done_about_a_foreign_process() -> None:
    foreign = ForeignConfig(
        rules=(
            ForeignRule(ForeignAction.EVICT, user="eve", command="python3"),
            ForeignRule(ForeignAction.IGNORE, user="eve"),
            ForeignRule(ForeignAction.PROTECT, command="Xorg"),
        )
    )
    assert foreign.action("eve", "python3") is ForeignAction.EVICT
    assert foreign.action("eve", "bash") is ForeignAction.IGNORE
    assert foreign.action("bob", "python3") is ForeignAction.PROTECT
    assert foreign.action("root", "Xorg") is ForeignAction.PROTECT
    assert foreign.action("root", "nvidia-persistenced") is ForeignAction.IGNORE
    assert ForeignConfig(default=ForeignAction.EVICT).action("bob", "python3") is ForeignAction.EVICT
    assert ForeignConfig(default=ForeignAction.EVICT).action("gdm", "Xorg") is ForeignAction.IGNORE


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:65535", ("::1", 65535)), ("localhost:80", ("localhost", 80))],
)
def test_an_address_is_split(address: str, expected: tuple[str, int]) -> None:
    assert split_host_port(address) == expected


@pytest.mark.parametrize(
    "address", ["", "x", ":1", "x:", "x:-1", "x:65536", "::1:80", "x:1²", " x:1", "a/b:1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"port|host"):
        split_host_port(address)


def test_loopback_is_what_this_machine_alone_reaches() -> None:
    assert [h for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost") if not is_loopback(h)] == []
    assert [h for h in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.evil") if is_loopback(h)] == []


# A VTN ------------------------------------------------------------------------------------------

VTN = '[openadr]\nvtn_url = "https://vtn.example/openadr3"\nprogram = "p"\n'


def test_a_vtn_on_this_machine_may_be_spoken_to_in_the_clear() -> None:
    assert parse(VTN.replace("https://vtn.example", "http://[::1]:8080")).openadr.program == "p"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (VTN.replace("https", "http"), "openadr.vtn_url: must begin with https://"),
        (VTN.replace("https", "ftp"), "openadr.vtn_url: must be https://host/path"),
        (
            VTN.replace("vtn.example", "me:pw@vtn.example"),
            "openadr.vtn_url: must be https://host/path without user",
        ),
        (VTN.replace("vtn.example", "vtn.example:port"), "openadr.vtn_url: must be a URL"),
        (VTN.replace('program = "p"', ""), "openadr: program is missing"),
        ('[openadr]\nprogram = "p"\n', "openadr.program: does nothing without openadr.vtn_url"),
        (VTN + 'client_id = "c"\n', "client_id and client_secret_file go together"),
        (VTN + 'client_secret_file = "/s"\n', "client_id and client_secret_file go together"),
        (VTN + 'client_id = "c"\nclient_secret_file = "s"\n', "client_secret_file: must be an absolute path"),
        (VTN + 'webhook_url = "https://me.example/"\n', "webhook_listen and webhook_url go together"),
        (
            VTN + 'webhook_listen = "1"\nwebhook_url = "https://me.example/"\n',
            "webhook_listen: must be host:port",
        ),
        (
            VTN + 'webhook_listen = "[::]:1"\nwebhook_url = "http://me.example/"\n',
            "webhook_url: must begin with",
        ),
        (VTN + "poll_s = 400.0\n", "openadr.contact_lost_s: must be more than openadr.poll_s (400 s)"),
        (
            VTN + 'client_secret = "x"\n',
            "openadr.client_secret: unknown key; did you mean client_secret_file?",
        ),
    ],
)
def test_what_is_wrong_with_a_vtn_is_named(text: str, words: str) -> None:
    assert words in problem(text)


MINER_JOB = '[[standing_jobs]]\nname = "m"\ncommand = ["/m"]\n'
WITH_API = 'miner_api = "t-rex"\nminer_port = 4067\nminer_algorithm = "KawPow"\n'


def test_a_miners_api_is_read_with_its_algorithm_in_lower_case() -> None:
    (job,) = config.parse(MINER_JOB + WITH_API + "miner_fee_ratio = 0.02\n", "f").standing_jobs
    assert job.miner == Miner(MinerApi.T_REX, 4067, "kawpow", 0.02)
    assert job.spec(Policy()).miner == job.miner


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('miner_api = "phoenix"\n', "standing_jobs[0].miner_api: must be one of t-rex, lolminer"),
        ("miner_port = 4067\n", "standing_jobs[0].miner_port: does nothing without miner_api"),
        ('miner_api = "rigel"\nminer_algorithm = "x"\n', "miner_port is missing"),
        ('miner_api = "rigel"\nminer_port = 4067\n', "miner_algorithm: must be the name"),
        ('miner_api = "rigel"\nminer_port = 65500\nminer_algorithm = "x"\n', "number from 1 to 65407"),
        (WITH_API + 'class = "batch"\n', 'miner_api: is for class = "mining" only'),
        (WITH_API + "miner_fee_ratio = 1.5\n", "number from 0 to 1"),
        (WITH_API + 'miner_token_variable = "T"\n', 'must be a name in environment, is "T"'),
        (
            WITH_API + MINER_JOB.replace('"m"', '"n"') + WITH_API.replace("4067", "4070"),
            'standing_jobs[1].miner_port: meets the ports of "m" on other GPUs',
        ),
    ],
)
def test_what_is_wrong_with_a_miners_api_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.parse(MINER_JOB + text, "f")
    assert words in str(raised.value)


def test_standing_jobs_that_take_turns_may_share_a_port_and_hashprices_need_a_place() -> None:
    both = MINER_JOB + WITH_API + MINER_JOB.replace('"m"', '"n"') + WITH_API
    assert len(config.parse(both, "f").standing_jobs) == 2
    with pytest.raises(ConfigError, match="hashprice_source: must be an absolute path"):
        config.parse('[mining]\nhashprice_source = "prices.csv"\n', "f")
