"""Published and tensor-parallel checkpoint files: reading, writing, splitting and merging them."""
