"""What ``tp-mamba`` can do: one module per verb."""
