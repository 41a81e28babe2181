"""Segmentations for other programs: written, read back and compared."""
