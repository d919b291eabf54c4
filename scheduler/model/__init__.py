"""Frozen values: jobs, GPUs, policy, snapshot, events, actions."""
