"""What a user can mend about a model."""

from __future__ import annotations


class ModelError(ValueError):
    """One sentence: the key or file, what is wrong with it, what would be right."""
