"""Our GPU kernels, in Triton: torch and Triton only, no DeepSpeed, no nvcc.

One file a kernel, each with a Python front that checks shapes once. `engine.modules.triton_modules` makes DeepSpeed
modules of them. They compile for every GPU from sm_80 on (`tests/kernels/test_compiles.py`, which needs none), and what
they compute is tested in Triton's interpreter on a CPU. **None has run on a GPU yet.**

Rules that hold for all: offsets into the KV cache are int64 (a layer of a 141 GB card's pool has more than 2^31
elements); what lies behind a sequence's end in its blocks is never read (it may be NaN, and 0 * NaN is NaN); sums are
float32, and results are rounded where the torch modules round theirs; what differs from step to step is not specialised
for, so that nothing is compiled in the middle of serving but at a shape's first use.
"""
