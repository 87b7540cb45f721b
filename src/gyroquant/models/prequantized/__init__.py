"""Checkpoints that other programs have quantized, decoded as they are read: every module here registers one format."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
