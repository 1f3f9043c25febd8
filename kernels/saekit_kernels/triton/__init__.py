"""The path for GPUs: Triton kernels for what a library does not do well. Same names and meaning as `portable`.

encode.py   matrix product with a filter in its epilogue, the phases of an exact selection
select.py   the k largest of a short list of candidates
decode.py   gathers of decoder rows: decode, residual and value gradient, dots at kept pairs
grads.py    weight gradients by feature, without atomics; the same with Adam in one kernel
row_adam.py Adam by rows, with projection and unit norm
shipped.py  what the compile gate compiles
"""
