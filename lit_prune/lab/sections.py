"""The lab's sections of the report page: importing this module registers them."""

from importlib import import_module
from pkgutil import iter_modules

from lit_prune import lab

DRAWING = ("figures", "report_tables")
"""Modules of a verb's folder that have sections."""

for verb in iter_modules(lab.__path__, f"{lab.__name__}."):
    if verb.ispkg:
        for module in iter_modules(import_module(verb.name).__path__):
            if module.name in DRAWING:
                import_module(f"{verb.name}.{module.name}")
