"""Wattshift: turns GPUs and a changing supply of power into the most value, every second."""
