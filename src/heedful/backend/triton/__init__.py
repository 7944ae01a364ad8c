"""heedful on CUDA devices through Triton: backend.py is the backend, plan.py what a kernel is compiled for.

The kernels (schedule.py, scores.py, forward.py, backward.py, bias.py, combine.py) import triton and are loaded with the
first call that runs here.
"""
