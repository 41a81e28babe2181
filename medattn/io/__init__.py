"""Reading and writing volumes: the only code that knows file formats and their coordinate conventions."""

from medattn.io.volume import Volume, read_geometry, read_volume, write_volume

__all__ = ["Volume", "read_geometry", "read_volume", "write_volume"]
