"""How a `heedful.KVCache` keeps its keys and values: in one buffer, in a ring of blocks, or in blocks out of a pool."""
