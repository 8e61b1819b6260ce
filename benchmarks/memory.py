"""Measure the peak memory of a step of a benchmark, of this process or of the GPU."""

from pathlib import Path

import torch


def start_of_peak(on_gpu: bool) -> int:
    """Reset the peak, and return the bytes in use now."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of resident memory
    return peak(on_gpu)


def peak(on_gpu: bool) -> int:
    """Return the peak memory in bytes since :func:`start_of_peak`."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
