"""What the operator's pages say exists: settings, alerts, metrics, files."""

import re
from pathlib import Path

import pytest

from scheduler import config

ROOT = Path(__file__).resolve().parents[2]
OPERATING = ROOT / "docs/operating"
RULES = ROOT / "deploy/prometheus/wattshift.rules.yml"
RULE_TESTS = ROOT / "deploy/prometheus/wattshift.rules.test.yml"
PAGES = sorted(OPERATING.glob("*.md"))
# Of every process, by prometheus_client; and Prometheus's own.
OTHERS_METRICS = {"process_start_time_seconds", "up"}

# Fields by which the pages translate, as NVIDIA's dcgm_fields.py names them [as triton-model-analyzer 1.58
# bundles it].
DCGM_FIELDS = """
DEV_CLOCK_THROTTLE_REASONS DEV_CORRECTABLE_REMAPPED_ROWS DEV_DEC_UTIL DEV_ECC_DBE_VOL_TOTAL
DEV_ECC_SBE_VOL_TOTAL DEV_ENC_UTIL DEV_ENFORCED_POWER_LIMIT DEV_FAN_SPEED DEV_FB_FREE DEV_FB_TOTAL
DEV_FB_USED DEV_GPU_TEMP DEV_GPU_UTIL DEV_MAX_SM_CLOCK DEV_MEMORY_TEMP DEV_MEM_CLOCK DEV_MEM_COPY_UTIL
DEV_NVLINK_BANDWIDTH_TOTAL DEV_PCIE_REPLAY_COUNTER DEV_PCIE_RX_THROUGHPUT DEV_PCIE_TX_THROUGHPUT
DEV_POWER_MGMT_LIMIT DEV_POWER_MGMT_LIMIT_DEF DEV_POWER_MGMT_LIMIT_MAX DEV_POWER_MGMT_LIMIT_MIN
DEV_POWER_USAGE DEV_POWER_VIOLATION DEV_ROW_REMAP_FAILURE DEV_SHUTDOWN_TEMP DEV_SLOWDOWN_TEMP
DEV_SM_CLOCK DEV_TOTAL_ENERGY_CONSUMPTION DEV_UNCORRECTABLE_REMAPPED_ROWS DEV_VGPU_LICENSE_STATUS
DEV_VIDEO_CLOCK DEV_XID_ERRORS PROF_DRAM_ACTIVE PROF_GR_ENGINE_ACTIVE
"""


def alerts() -> list[str]:
    return re.findall(r"- alert: (\w+)", RULES.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_of_a_configuration_is_a_valid_one(page: Path) -> None:
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        config.parse(block, page.name)


def test_there_are_examples_of_configurations() -> None:
    assert (OPERATING / "configuration.md").read_text().count("```toml") >= 3


def test_the_errors_that_are_shown_are_those_that_are_given() -> None:
    text = "\n\n[sampling]\nperiod = 2\n\n[classes.mining]\n\ngrace_s = -1\n"
    page = (OPERATING / "configuration.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("wattshift.toml:")]
    for wrong, line in ((text.replace("\n\n[s", "\n[s"), shown[0]), (text[1:], shown[1])):
        with pytest.raises(config.ConfigError) as raised:
            config.parse(wrong, "wattshift.toml")
        assert line.split(":", 2)[2] in str(raised.value)


def test_every_alert_has_its_section_in_the_runbook_and_its_test() -> None:
    sections = re.findall(r"^### (Wattshift\w+)$", (OPERATING / "runbook.md").read_text(), flags=re.MULTILINE)
    tested = re.findall(r"alertname: (\w+)", RULE_TESTS.read_text())
    assert sections == alerts()
    assert set(tested) == set(alerts())


def test_every_metric_that_an_alert_asks_for_is_documented() -> None:
    asked = {
        re.sub(r"_bucket$", "", name)
        for expression in re.findall(r"expr: (.*?)\n {8}\w", RULES.read_text(), flags=re.DOTALL)
        for name in re.findall(
            r"\b([a-z]\w*_\w+|up)\b(?=[{\[)\s])", re.sub(r"\(le\)|by \([^)]*\)", "", expression)
        )
    }
    assert "wattshift_problems" in asked
    documented = set(re.findall(r"`(\w+)`", (OPERATING / "metrics.md").read_text()))
    unknown = {name for name in asked - OTHERS_METRICS if name.removeprefix("wattshift_") not in documented}
    assert unknown - {"histogram_quantile"} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_names_of_dcgm_are_those_of_its_fields() -> None:
    named = {name for page in PAGES for name in re.findall(r"DCGM_FI_(\w+)", page.read_text())}
    assert named == set(DCGM_FIELDS.split())
