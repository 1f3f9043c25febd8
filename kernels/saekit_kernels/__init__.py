"""Operations of sparse dictionaries: encode and select, decode, gradients, optimizer. Knows matrices and sparse rows only.

    from saekit_kernels import RowCount, decode, encode_select
    codes = encode_select(x_BD, W_enc_FD, b_enc_F, b_dec_D, rule=RowCount(32)).codes
    y_BD = decode(codes, W_dec_FD, b_dec_D)

rules.py (what to keep) → codes.py (what was kept) → reference.py (the equations) → portable.py, cpu.py (the fast paths)
→ ops.py (the doors: dispatch, registration with torch, gradients)
"""

from saekit_kernels.codes import Codes, Pairs
from saekit_kernels.ops import (
    COUNTERS,
    Choice,
    DecodeOut,
    EncodeOut,
    ExtraRows,
    aux_decode,
    build_csc,
    decode,
    decode_residual_value_grad,
    encode_select,
    explain,
    feature_sums,
    pair_dots,
    row_adam_,
    segment_adam_,
    segment_weight_grads,
    using,
    why_not_bf16,
)
from saekit_kernels.portable import Workspace
from saekit_kernels.reference import Csc, WeightGrads
from saekit_kernels.rules import BatchCount, ColumnCount, RowCount, RowMass, Rule, Threshold

__all__ = [
    "COUNTERS",
    "BatchCount",
    "Choice",
    "Codes",
    "ColumnCount",
    "Csc",
    "DecodeOut",
    "EncodeOut",
    "ExtraRows",
    "Pairs",
    "RowCount",
    "RowMass",
    "Rule",
    "Threshold",
    "WeightGrads",
    "Workspace",
    "aux_decode",
    "build_csc",
    "decode",
    "decode_residual_value_grad",
    "encode_select",
    "explain",
    "feature_sums",
    "pair_dots",
    "row_adam_",
    "segment_adam_",
    "segment_weight_grads",
    "using",
    "why_not_bf16",
]
