"""The bound that scores are told against: of a small world by hand, and of a published one."""

from pathlib import Path

import pytest

from tests.benchmarks.worlds32 import DATA, bound_usd

PUBLISHED = DATA / "worlds32" / "slack1.0_load1.5"
FILES = {
    "nodes": "node_id,gpu_model,gpus\nn0,H100,4\n",
    "prices": "start_s,usd_per_mwh\n0,100\n7200,1000\n",
    "events": "event_id,start_s,end_s,site_power_w,notice_s,emergency\ne,0,3600,1000,0,true\n",
    "jobs": (
        "job_id,submit_s,class,gpus,duration_s,value_usd_per_gpu_hour,deadline_s,draw_w\n"
        "i,0,INFERENCE,1,172800,9,,500\n"
        "t,0,TRAINING,2,3600,2,7200,500\n"
        "b,0,BATCH,1,7200,1,3600,500\n"
        "m,0,MINING,1,0,0.3,,500\n"
    ),
}


def test_the_bound_is_the_best_of_a_small_world(tmp_path: Path) -> None:
    """For an hour there are 500 W beside inference, and then three GPUs; after two hours energy is dear."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.csv").write_text(text)
    training = 2 * (
        2 - 0.05
    )  # whole in the second hour, with an hour of all that batch could do in the first
    batch = 1 - 0.05
    mining = 0.3 - 0.05  # in the second hour; then energy costs more
    assert bound_usd(tmp_path) == pytest.approx(training + batch + mining)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the worlds beside the project")
def test_the_bound_of_a_published_world_is_the_published_one() -> None:
    assert bound_usd(PUBLISHED / "seed1") == pytest.approx(476.6753, abs=1e-3)
