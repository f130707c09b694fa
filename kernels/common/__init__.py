"""What operators share: checks, limits, dtypes, dispatch, device properties, and helpers of their Triton kernels."""
