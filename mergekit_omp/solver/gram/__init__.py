"""Batched OMP: propose several steps from a candidate list and verify them in one scan."""
