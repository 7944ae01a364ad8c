"""Level 4's kernels in Triton: sources alone; `launch` calls them, `compilation` compiles them without a GPU."""
