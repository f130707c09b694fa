"""Continuous batching: from requests to tokens."""
