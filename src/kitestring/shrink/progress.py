"""What a person sees while a search runs."""

from __future__ import annotations

from kitestring.comparison import progress


class Progress(progress.Progress):
    """As that of a comparison, under another name: `what` is under way."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def __enter__(self) -> Progress:
        super().__enter__()
        self._bars.update(self._whole, description=self._what)
        return self
