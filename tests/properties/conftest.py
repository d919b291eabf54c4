"""Hypothesis profiles: few worlds of each kind by default, more where HYPOTHESIS_PROFILE asks for them."""

import os

from hypothesis import HealthCheck, settings

# Plans of small worlds are fast, the oracle's exhaustive search is not: no deadline for an example.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}
settings.register_profile("fast", max_examples=40, derandomize=True, database=None, **_COMMON)
# The same worlds each time, so that what fails is what changed; the hunt goes through others each time.
settings.register_profile("long", max_examples=300, derandomize=True, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=3000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))
