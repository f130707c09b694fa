"""Ranks as processes: how they start, which error of theirs is told, and what signals do to them."""
