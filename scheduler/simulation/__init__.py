"""The simulated world, for users and tests."""
