"""What a device does without: the packages of the extra `compare`."""

from __future__ import annotations

import importlib.util

from kitestring.errors import SettingError

INSTALL = "pip install 'kitestring[compare]'"


def need(doing: str, *modules: str) -> None:
    """Raises `SettingError` for the first of the modules that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise SettingError(
                f"{doing} needs {module}, which is not installed", mend=f"Run: {INSTALL}"
            )
