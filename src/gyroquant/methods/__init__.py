"""Methods: statistics of a site -> the map to fold there. One file each."""

from importlib import import_module
from pkgutil import iter_modules

from gyroquant.methods.base import BlockwiseMethod, Context, Method

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["BlockwiseMethod", "Context", "Method"]
