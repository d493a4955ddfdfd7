"""What an error must be: of the right kind, one line, with what, where and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kitestring.errors import KitestringError


@contextmanager
def told(
    kind: type[KitestringError], *parts: str, where: str = "", mend: str = ""
) -> Iterator[None]:
    """The block raises exactly `kind`, whose line holds `parts`."""
    with pytest.raises(kind) as caught:
        yield
    error = caught.value
    assert type(error) is kind
    assert "\n" not in str(error)
    assert len(str(error)) < 400
    for part in parts:
        assert part in str(error), (part, str(error))
    assert where in error.where, (where, error.where)
    assert error.mend, str(error)
    assert mend in error.mend, (mend, error.mend)
