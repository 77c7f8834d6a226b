"""Timings of fastnet against the strongest alternatives: what `fastnet bench` runs.

A benchmark is a module with a function `cases(quick)`; `harness.py` verifies and times what that
yields, `results.py` keeps it.
"""

# The benchmarks, in the order they run in.
OPS = (
    "linear_relu",
    "cross_entropy",
    "conv_relu_pool",
    "gather_pictures",
    "accelerate",
    "optimizer",
    "mlp_trainer",
    "recipes",
)
