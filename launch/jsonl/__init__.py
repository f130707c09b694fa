"""A file of requests, one JSON object per line, and the file of their results: read, continued, written in order."""
