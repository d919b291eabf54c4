"""Pure: arrays, valuation, allocation, preemption, the planner."""
