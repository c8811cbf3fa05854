"""Text: how many bits the model needs per byte."""

from __future__ import annotations

import math

from data.scoring.base import IGNORED, ScoredRows, Scorer


class TextScorer(Scorer):
    """`bits_per_byte`: -log2 p of all predicted tokens, over the bytes that they stand for."""

    needs_nll = True

    def add(self, rows: ScoredRows) -> None:
        """See `Scorer.add`; a byte token stands for one byte, an end of text for none."""
        super().add(rows)
        self.count("nll", rows.nll)
        labels = rows.labels[rows.labels != IGNORED]
        self.count("bytes", labels < 256)

    def result(self) -> dict[str, float]:
        """See `Scorer.result`."""
        return {"bits_per_byte": self.mean("nll", "bytes") / math.log(2), **super().result()}

    def merit(self) -> float:
        """Fewer bits are better."""
        return -self.result()["bits_per_byte"]
