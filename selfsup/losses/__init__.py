"""Losses: tensors in, scalar out; at least float32; no process group, no schedule, no state."""
