"""The loop and recovery: the only place where plans become effects."""
