"""heedful's own engine as a backend: backend.py for torch, library.py and structures.py without it."""
