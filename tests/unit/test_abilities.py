"""What the daemon says of a driver that is not there, or does not let it do everything."""

import pytest

from scheduler.control.abilities import REMEDIES, driver_problem, limitations
from scheduler.model.gpus import GpuIdentity

REFUSED = "ERROR_NO_PERMISSION"


def gpu(index: int, refusal: str = "") -> GpuIdentity:
    return GpuIdentity(f"GPU-{index}", index, "H100", 81_559, power_limit_refusal=refusal)


def test_a_driver_that_answers_is_no_problem() -> None:
    assert driver_problem("") == ""


@pytest.mark.parametrize("code", sorted(REMEDIES))
def test_a_driver_that_can_not_be_opened_is_named_with_what_to_do(code: str) -> None:
    assert driver_problem(code) == f"no GPU can be read: {code}: {REMEDIES[code]}"


def test_an_answer_that_nobody_knows_is_named_all_the_same() -> None:
    assert driver_problem("ERROR_777") == "no GPU can be read: ERROR_777"


def test_gpus_that_let_their_limit_be_set_are_no_limitation() -> None:
    assert limitations([gpu(0), gpu(1)]) == ()


def test_a_limitation_names_its_gpus_once_by_index_and_the_remedy_where_there_is_one() -> None:
    known = [gpu(2, REFUSED), gpu(0, REFUSED), gpu(0, REFUSED), gpu(1), gpu(3, "ERROR_NOT_SUPPORTED")]
    unsupported, refused = limitations(known)
    assert unsupported == "power limits can't be set on GPU 3: ERROR_NOT_SUPPORTED; jobs run all the same"
    assert refused.startswith("power limits can't be set on GPU 0, 2: ERROR_NO_PERMISSION; jobs run all the")
    assert "CAP_SYS_ADMIN" in refused
