"""Named bf16 tensors in one safetensors file, in numpy alone: no torch, the same bytes always.

bf16 is the upper half of a float32, so numpy reads and writes it by shifting.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_LENGTH = struct.Struct("<Q")


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """The bits of the nearest bf16 numbers, ties to even. Values must be finite."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")


def pack_tensors(tensors: Mapping[str, Floats]) -> bytes:
    """A safetensors file of these tensors as bf16, in the order of their names."""
    header: dict[str, object] = {}
    parts: list[bytes] = []
    end = 0
    for name in sorted(tensors):
        content = to_bf16(tensors[name]).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensors[name].shape),
            "data_offsets": [end, end + len(content)],
        }
        end += len(content)
        parts.append(content)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([_LENGTH.pack(len(text)), text, *parts])


def unpack_tensors(content: bytes) -> dict[str, Floats]:
    """The tensors as float32. Raises ``ValueError`` for anything but whole bf16 tensors."""
    try:
        header_bytes = _LENGTH.unpack_from(content)[0]
        header = json.loads(content[_LENGTH.size : _LENGTH.size + header_bytes])
        data_at = _LENGTH.size + header_bytes
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} is {entry['dtype']} and not BF16")
            if data_at + last > len(content):
                raise ValueError(f"{name} is cut short")
            bits = np.frombuffer(content, "<u2", (last - first) // 2, data_at + first)
            tensors[name] = from_bf16(bits).reshape(entry["shape"])
        return tensors
    except (struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a safetensors file ({error})") from error
