"""The version of this package, in a module without other imports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def gyroquant_version() -> str:
    """The installed version of this package; "0" in a source tree that is not installed."""
    try:
        return version("gyroquant")
    except PackageNotFoundError:
        return "0"


__all__ = ["gyroquant_version"]
