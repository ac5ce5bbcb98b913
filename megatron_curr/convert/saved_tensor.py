"""What ``torch.save`` writes: one tensor viewed where it lies, and the layout of what is to come.

No copy, no code from the file.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


def view_of_saved_tensor(blob: memoryview) -> Tensor:
    """What ``torch.save`` wrote, as a view of its bytes. Runs no code from them.

    ``torch.save`` makes an uncompressed zip: a small pickle that names dtype, strides and storage,
    and the storage. Raises ``ValueError``, ``KeyError`` or what pickle and zip raise.
    """
    with zipfile.ZipFile(_Window(blob)) as archive:
        entries = {name.split("/", 1)[1]: archive.getinfo(name) for name in archive.namelist()}
        description = _TensorUnpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
    if not isinstance(description, _Description):
        raise pickle.UnpicklingError("it is no plain tensor")
    storage = entries[f"data/{description.storage}"]
    if storage.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    # A local header: 30 bytes, then a name and padding whose lengths it says.
    header = blob[storage.header_offset : storage.header_offset + 30]
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    first = storage.header_offset + 30 + name_length + extra_length
    data = blob[first : first + storage.file_size]
    if len(data) != storage.file_size:
        raise ValueError("it is cut short")
    flat = view_of_bytes(data, description.dtype)
    return torch.as_strided(flat, description.shape, description.strides, description.offset)


def saved_layout(build: Callable[[], object]) -> tuple[bytes | int, ...]:
    """The file that ``torch.save`` would write of what ``build`` makes of empty tensors.

    In order, bytes as they are and, for the values of each tensor, how many bytes they are. No
    tensor takes memory. The CRC32 of the values, which torch does not read, is 0.
    """
    sink = _Sink()
    with FakeTensorMode():
        content = build()
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content, sink)
    return tuple(sink.parts)


def view_of_bytes(data: memoryview, dtype: torch.dtype) -> Tensor:
    """Flat values over mapped bytes, which nobody may write to. Raises ``ValueError``."""
    if not len(data):
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the map is read-only
        return torch.frombuffer(data, dtype=dtype)


class _Sink(io.RawIOBase):
    """Keeps what is written, and the length of what is passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[bytes | int] = []

    def write(self, data: Any) -> int:
        if self.parts and isinstance(last := self.parts[-1], bytes):
            self.parts[-1] = last + bytes(data)
        else:
            self.parts.append(bytes(data))
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == io.SEEK_CUR
        self.parts.append(offset)
        return 0


class _Window(io.RawIOBase):
    """A file over part of a map, so that ``zipfile`` copies its directory only."""

    def __init__(self, blob: memoryview) -> None:
        super().__init__()
        self._blob, self._at = blob, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._blob))[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._blob) if size is None or size < 0 else self._at + size
        data = bytes(self._blob[self._at : end])
        self._at += len(data)
        return data


@dataclass(frozen=True)
class _Description:
    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _describe(
    storage: tuple[Any, ...], offset: int, shape: Any, strides: Any, *_: Any
) -> _Description:
    return _Description(str(storage[2]), storage[1], offset, tuple(shape), tuple(strides))


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of one tensor and admits nothing else."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor")
