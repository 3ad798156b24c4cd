"""What this machine computes with, and how much memory the process took."""

from __future__ import annotations

import os
import platform
import resource
import threading
from pathlib import Path

import torch

__all__ = ["PeakMemory", "compute_dtype", "host_class", "peak_resident_bytes", "set_up_torch"]

_STATUS = Path("/proc/self/status")
_SAMPLE_S = 0.05


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it in hardware, else float32 (emulated, bf16 is far slower)."""
    if platform.machine() == "aarch64":
        fast = " bf16" in Path("/proc/cpuinfo").read_text()
    else:
        fast = bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def host_class() -> str:
    """Everything about the machine that decides an adapter's bits; equal classes give equal bytes."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    dtype = str(compute_dtype()).removeprefix("torch.")
    version = torch.__version__.partition("+")[0]
    return f"{platform.machine()}-{capability}-{dtype}-torch{version}"


def set_up_torch(threads: int) -> None:
    """Fix what torch may choose by itself: threads, deterministic kernels, no slow denormals.

    Args:
        threads: CPU threads; 0 takes one a core that this process may use.
    """
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory with NaN guards against reading it; every buffer here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class PeakMemory:
    """Watches the process's own memory (RssAnon + RssShmem) from a thread; mapped weights do not count."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self.sample()
            if self._stop.wait(_SAMPLE_S):
                return

    def sample(self) -> int:
        """Take a sample now. Returns: The peak so far, bytes."""
        lines = _STATUS.read_text().splitlines()
        own = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
        self.peak_bytes = max(self.peak_bytes, own * 1024)
        return self.peak_bytes

    def stop(self) -> int:
        """End the watch. Returns: The peak, bytes."""
        self._stop.set()
        self._thread.join()
        return self.sample()


def peak_resident_bytes() -> int:
    """Largest resident set of the process so far, mapped files included (ru_maxrss)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
