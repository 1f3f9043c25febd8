"""What is shipped: every kernel with every set of constants that a launcher may pass, for the compile gate.

A module of this package lists its kernels in `SHIPPED`; its launchers take their constants from the same tables, so that what
is tested is what runs.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shipped:
    """One kernel, as one launch compiles it."""

    kernel: Any
    """A `triton.jit` function."""
    types: dict[str, str]
    """Parameter → type in Triton's notation ("*fp32", "i32", "fp32"), without the constants, in the kernel's order."""
    constants: dict[str, Any]
    """tl.constexpr parameters."""
    num_warps: int
    num_stages: int = 3
    gemm: bool = False
    """Matrix instructions must show in the code."""
    gather: bool = False
    """128-bit loads must show in the code for sm_90."""
    ragged: tuple[str, ...] = field(default=())
    """Parameters that a launch does not promise to be divisible by 16, beside the floats."""

    @property
    def name(self) -> str:
        constants = ",".join(f"{k}={v}" for k, v in self.constants.items())
        return f"{self.kernel.__name__}[{constants}]w{self.num_warps}s{self.num_stages}"
