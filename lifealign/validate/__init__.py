"""Check a configuration without training anything: keys, files, rows, templates, masks, batches, and what it will take."""

from lifealign.validate.command import validate

__all__ = ["validate"]
