"""Text generation: sampling, stop conditions, batching and streaming."""
