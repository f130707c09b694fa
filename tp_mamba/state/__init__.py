"""Recurrent state of many sequences."""
