"""What a person runs: the ``tp-mamba`` command and its torchrun entry points."""
