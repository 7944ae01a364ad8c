"""What model code imports from `flash_attn.layers`."""
