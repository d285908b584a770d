"""Tensors in files that anyone may read as safetensors, and that hold the SHA-256 of themselves.

The digest stands in the header's metadata, under "digest". It is that of the whole file with zeros in the digest's
place, so that every other byte counts: names, types and shapes, what else the header says, and the numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.runs import digests
from offramp.runs.bounded import parsed
from offramp.runs.files import replace_file

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Number formats by what safetensors calls them."""
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors reads no longer one."""
_NONE = "0" * 64
_CHUNK = 1 << 22  # bytes that are read or hashed together


@dataclass(frozen=True)
class Part:
    """A tensor to be written piece by piece: its format, one of `NAMES`, its sizes, and its bytes in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[bytes | memoryview]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, atomically, over an older file, with texts for its header, where "digest" is added."""
    write_parts(path, {n: Part(t.dtype, tuple(t.shape), [_bytes(t)]) for n, t in tensors.items()}, header or {})


def write_parts(path: Path, parts: Mapping[str, Part], header: Mapping[str, str]) -> None:
    """`write_tensors` for tensors that need not be in memory."""
    order = sorted(parts, key=lambda name: (-parts[name].dtype.itemsize, name))  # so that numbers stand aligned
    described: dict[str, Any] = {"__metadata__": {**header, "digest": _NONE}}
    end = 0
    for name in order:
        part = parts[name]
        start, end = end, end + part.dtype.itemsize * math.prod(part.shape)
        described[name] = {"dtype": NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = struct.pack("<Q", len(text)) + text
    place = begin.index(f'"digest":"{_NONE}"'.encode()) + len('"digest":"')

    def write(temporary: Path) -> None:
        digest = hashlib.sha256(begin)
        with temporary.open("wb") as file:
            file.write(begin)
            for name in order:
                for piece in parts[name].pieces:
                    digest.update(piece)
                    file.write(piece)
            file.seek(place)
            file.write(digest.hexdigest().encode())

    replace_file(path, write)


def read_tensors(path: Path, advice: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts of the header, and tensors by name, memory-mapped; a ValueError if they are not what was written."""
    from safetensors import SafetensorError, safe_open

    header = read_header(path, advice)
    try:
        with safe_open(path, framework="pt") as file:
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(_damaged(path, error, advice)) from error


def read_header(path: Path, advice: str) -> dict[str, str]:
    """The texts of a header, its digest compared with the file; a warning if there is none (earlier versions)."""
    begin, texts = _begin(path, advice)
    digest = texts.pop("digest", None)
    if digest is None:
        digests.warn_of_none(path)
        return texts
    if len(digest) != len(_NONE) or _digest_of(path, begin, digest) != digest:
        raise ValueError(f"{path} is not what was written: it was changed or is damaged (its digest differs); {advice}")
    return texts


def claimed_header(path: Path, advice: str) -> dict[str, str]:
    """The texts of a file's header, digest and all, without a look at the rest; a ValueError if it is damaged."""
    return _begin(path, advice)[1]


def not_finite_in(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first of these tensors that holds NaN or infinity; None: none does."""
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)


def _digest_of(path: Path, begin: bytes, digest: str) -> str:
    """SHA-256 of a file that begins so, with zeros in the place of its digest."""
    found = hashlib.sha256(begin.replace(digest.encode(), _NONE.encode(), 1))
    with path.open("rb") as file:
        file.seek(len(begin))
        while piece := file.read(_CHUNK):
            found.update(piece)
    return found.hexdigest()


def _begin(path: Path, advice: str) -> tuple[bytes, dict[str, str]]:
    """The header as it stands in the file, length included, and its texts."""
    try:
        with path.open("rb") as file:
            begin = file.read(8)
            length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
            if not 0 < length <= min(LONGEST_HEADER, path.stat().st_size - 8):
                raise ValueError("it does not begin with the length of a header")
            begin += file.read(length)
        described = parsed(begin[8:].decode("utf-8"), "its header")
        texts = described.get("__metadata__", {}) if isinstance(described, dict) else None
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("its header is none")
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(path, error, advice)) from error
    return begin, texts


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def _damaged(path: Path, error: Exception, advice: str) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return f"{path} is missing or damaged ({said[:200]}); {advice}"
