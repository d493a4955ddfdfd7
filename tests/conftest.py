"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real datasets: tests that need it are skipped where there is none.

    KITESTRING_DATA_REQUIRED=1 makes its absence a failure: no build then skips them unnoticed."""
    folder = os.environ.get("KITESTRING_DATA", "")
    if folder and Path(folder).is_dir():
        return Path(folder)
    if os.environ.get("KITESTRING_DATA_REQUIRED") == "1":
        pytest.fail("KITESTRING_DATA_REQUIRED=1, but KITESTRING_DATA names no folder")
    pytest.skip("KITESTRING_DATA names no folder of datasets")
