"""Where arithmetic runs and in which precision: chosen once, with the reason."""

import ctypes
from functools import cache
from importlib.metadata import version

import torch
from saekit_kernels import why_not_bf16

from saekit.errors import SaekitError

# of malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resolve_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one. Raises SaekitError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise SaekitError(f"device {name} is not available here; pass --device cpu or auto") from None
    return device


@cache
def keep_freed_memory():
    """Lets the C library's allocator keep what a forward pass on the CPU frees, for the next batch.

    By default glibc gives the top of its heap back to the kernel again and again, and every page that comes anew is a fault:
    a quarter of a pass in bf16. Blocks up to 64 MB come from the heap now, and up to 512 MB of it stay. For the whole process,
    once; nothing happens where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 64 << 20)
    mallopt(M_TRIM_THRESHOLD, 512 << 20)


def resolve_compute(name: str, device: torch.device) -> tuple[str, str]:
    """(fp32 or bf16, reason) of the encoder product in training. `auto` is bf16 where the device has units for it."""
    reason = why_not_bf16(device.type)
    if name == "bf16" and reason:
        raise SaekitError(f"--compute bf16: {reason}; pass --compute fp32")
    if name == "auto":
        return ("fp32", reason) if reason else ("bf16", "this device multiplies bf16 in hardware")
    return name, "asked for"


def environment_of(device: torch.device) -> dict:
    """What may change the last bits of an activation, in the manifest's words."""
    environment = {"torch": torch.__version__, "transformers": version("transformers"), "device": device.type}
    if device.type == "cuda":
        environment["device"] = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        environment |= {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return environment
