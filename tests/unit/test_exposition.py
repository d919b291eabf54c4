"""The metrics page's format, read back by prometheus_client's own parser."""

import math

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from scheduler.api.exposition import Page
from scheduler.control.meters import Histogram


def read_back(page: Page) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.encoded().decode())
        for sample in family.samples
    }


def of(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"wattshift_{name}", frozenset(labels.items())


def test_gauges_and_counters_keep_every_digit_and_their_labels() -> None:
    page = Page()
    page.gauge("one", "A gauge.", [((), 0.1 + 0.2)])
    page.gauge("flag", "True or false.", [(("a",), True), (("b",), False)], ("gpu",))
    page.counter("energy_joules", "Counted.", [(("a",), 2**53 / 1000)], ("gpu",))
    assert read_back(page) == {
        of("one"): 0.1 + 0.2,
        of("flag", gpu="a"): 1.0,
        of("flag", gpu="b"): 0.0,
        of("energy_joules_total", gpu="a"): 2**53 / 1000,
    }


def test_a_label_of_any_text_is_read_back_as_it_was() -> None:
    page = Page()
    model = 'H100 "PCIe" \\ {x="y",} \n µ'
    page.gauge("gpu_info", "A GPU.", [(("GPU-1", model), 1)], ("gpu", "model"))
    assert read_back(page) == {of("gpu_info", gpu="GPU-1", model=model): 1.0}


def test_words_of_enums_are_written_in_lower_case_and_nothing_else_is() -> None:
    page = Page()
    page.counter("moves", "Moves.", [(("BATCH", "OK"), 2)], ("class", "code"))
    assert read_back(page) == {of("moves_total", **{"class": "batch", "code": "OK"}): 2.0}


def test_a_histogram_has_running_buckets_a_sum_and_a_count() -> None:
    page = Page()
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.5, 0.5, 7.0):
        histogram.observe(value)
    page.histogram("wait_seconds", "Waits.", {("TRAINING",): histogram}, ("class",))
    found = read_back(page)
    buckets = {
        dict(labels)["le"]: value for (name, labels), value in found.items() if name.endswith("_bucket")
    }
    assert {float(limit): value for limit, value in buckets.items()} == {0.1: 1, 1.0: 3, math.inf: 4}
    assert found[of("wait_seconds_count", **{"class": "training"})] == 4
    assert found[of("wait_seconds_sum", **{"class": "training"})] == 8.05


def test_a_family_without_values_is_not_on_the_page() -> None:
    page = Page()
    page.gauge("gpu_fan_speed_ratio", "Fans.", [], ("gpu",))
    page.histogram("wait_seconds", "Waits.", {})
    assert page.encoded() == b""


def test_what_prometheus_client_says_of_the_process_keeps_its_own_names() -> None:
    page = Page()
    page.family(GaugeMetricFamily("process_open_fds", "Open files.", value=7))
    page.family(CounterMetricFamily("process_cpu_seconds", "Time spent.", value=0.1 + 0.2))
    nothing: frozenset[tuple[str, str]] = frozenset()
    assert read_back(page) == {
        ("process_open_fds", nothing): 7.0,
        ("process_cpu_seconds_total", nothing): 0.1 + 0.2,
    }
