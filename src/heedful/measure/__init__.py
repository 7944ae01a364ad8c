"""How heedful measures itself: environment record, numerical checks, interleaved timing, peaks and memory."""
