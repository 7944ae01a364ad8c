"""The names of other libraries, one module each, for code that changes its import lines only."""
