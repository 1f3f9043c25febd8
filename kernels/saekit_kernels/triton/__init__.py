"""The path for GPUs: Triton kernels for what a library does not do well. Same names and meaning as `portable`.

encode.py   matrix product with a filter in its epilogue, the phases of an exact selection
select.py   the k largest of a short list of candidates
decode.py   gathers of decoder rows: decode, residual and value gradient, dots at kept pairs
grads.py    weight gradients by feature, without atomics; the same with Adam in one kernel
row_adam.py Adam by rows, with projection and unit norm
shipped.py  what the compile gate compiles

Sorting the pairs by feature stays torch's. Nothing here has run on a GPU yet: the interpreter and the compilers for sm_80, sm_90
and gfx942 have passed it. So `portable` is what a GPU gets, and `using("triton")` asks for this.
"""

from saekit_kernels.portable import build_csc
from saekit_kernels.triton.decode import decode, decode_residual_value_grad, pair_dots
from saekit_kernels.triton.encode import cannot, encode_select
from saekit_kernels.triton.grads import feature_sums, segment_adam_, segment_sum, weight_grads
from saekit_kernels.triton.row_adam import row_adam_

__all__ = [
    "build_csc",
    "cannot",
    "decode",
    "decode_residual_value_grad",
    "encode_select",
    "feature_sums",
    "pair_dots",
    "row_adam_",
    "segment_adam_",
    "segment_sum",
    "weight_grads",
]
