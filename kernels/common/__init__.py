"""What several operators share: argument checks, dispatch, launch arithmetic, and Triton functions."""
