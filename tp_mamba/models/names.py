"""The two names of this package's own tensors that loaders treat apart, because a tied head shares the embedding."""

from __future__ import annotations

from typing import Final

EMBEDDING: Final = "backbone.embeddings.weight"
LM_HEAD: Final = "lm_head.weight"
