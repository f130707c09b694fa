"""Scores of a model on lm_eval's tasks, over all ranks."""
