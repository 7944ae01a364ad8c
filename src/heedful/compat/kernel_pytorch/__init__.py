"""The names of `kernel_pytorch`, a guide's package of GPU optimizations, module by module.

from heedful.compat.kernel_pytorch.compiler_integration import PyGraphCUDAOptimizer
"""
