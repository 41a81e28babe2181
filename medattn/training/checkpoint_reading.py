"""Reading torch's distributed checkpoints without running what a file says.

Torch keeps a checkpoint's table of contents as a pickle and reads it with all that a pickle may do, and small
values likewise. Run folders are passed on, so here the table may only be made of the classes that torch's own
writer puts into it, and values only of plain types.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

ALLOWED = {
    "torch": {"Size", *(name for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},  # a name -> the layout of that name
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},  # as Python 3.13 calls it
}


class PlainReader(FileSystemReader):
    """Reads a checkpoint of torch's from a folder, and no file outside it, whatever the table says.

    Raises pickle.UnpicklingError for one that would have to run code.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("no table of contents")
        for stored in metadata.storage_data.values():
            if "/" in stored.relative_path or stored.relative_path == "..":
                raise pickle.UnpicklingError(f"a file outside the folder, {stored.relative_path!r}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainPlanner(DefaultLoadPlanner):
    """Puts small values of plain types into their places."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """One value. Raises pickle.UnpicklingError for one that has to run code."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # safe now in the hands of torch's planner
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"instructions of its own, {module}.{name}")
        return super().find_class(module, name)
