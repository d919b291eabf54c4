"""Hypothesis profiles: few examples by default, many where HYPOTHESIS_PROFILE=thorough asks for it."""

import os

from hypothesis import HealthCheck, settings

# Plans of small worlds are fast, the oracle's exhaustive search is not: no deadline for an example.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}
settings.register_profile("fast", max_examples=40, derandomize=True, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=3000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))
