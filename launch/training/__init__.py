"""What ``tp-mamba train`` asks a person for, and shows."""
