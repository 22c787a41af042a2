"""Reading ``.pt`` files: tensors by name and plain values, and nothing that could run.

A ``.pt`` file is a zip archive: ``NAME/data.pkl``, a pickle that says which tensor is which part
of which storage, and ``NAME/data/KEY``, the bytes of each storage.  Both are read here, not by
``torch.load``: it allocates what the archive only claims to hold, trusts the pickle's word on how
long a storage is, and raises a dozen different errors.  The pickle can name nothing but what
stands in this module, so nothing that it says is ever executed.

References
----------
``torch/serialization.py`` (``_save``, ``_load``), ``torch/_utils.py`` (``_rebuild_tensor_v2``).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

import torch
from torch import Tensor

from acdc.files import MAX_WEIGHTS
from graphs.errors import InputError
from graphs.files.whole import check_regular

__all__ = ["read_pt"]

_CHUNK = 1 << 20
_MAX_PICKLE = 16 << 20  # bytes; a model of 10,000 tensors takes 3 MiB
_MAX_REPEATED = 4  # one matrix may be two tensors (tied embeddings), not a thousand
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_FOREIGN = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_from_type_v2": "a tensor of a class of its own, or with attributes",
    "_rebuild_tensor_v3": "a tensor of a type that models do not run in",
}


_DAMAGED = "it is truncated or damaged, or holds other objects"


class _UnreadableError(Exception):
    """Why a file is no ``.pt`` file of plain tensors; ends as the caller's error."""


# What zipfile, a pickle of nonsense and views of storages raise.
_BROKEN = (
    _UnreadableError, zipfile.BadZipFile, OSError, NotImplementedError, EOFError, MemoryError,
    pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    RuntimeError,
)  # fmt: skip


def read_pt(
    path: str | os.PathLike[str], failure: type[InputError] = InputError, what: str | None = None
) -> Any:
    """Return what a ``.pt`` file holds: tensors on the CPU and plain values in lists and dicts.

    Tensors that required gradients come back as plain values without them.

    Parameters
    ----------
    path
        A file that ``torch.save`` of torch 1.6 or later wrote.
    failure
        What is raised.
    what
        What the message calls the file; None: its path.

    Raises
    ------
    InputError
        (``failure``)  If the file is damaged or of another kind; claims more than it holds; or
        holds anything but numbers, texts and dense tensors: the message then says what and where.
    """
    size = check_regular(path, MAX_WEIGHTS, failure).st_size
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, size)
    except _BROKEN as error:
        raise failure(
            f"{what or path} cannot be read as plain tensors: {_reason(path, error)}; save it "
            "again with nothing but those"
        ) from error


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, _UnreadableError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, zipfile.BadZipFile):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
                return "it is in the format of torch before 1.6"
    return _DAMAGED


# --- the archive --------------------------------------------------------------------------


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    """Return the value in an archive on disk of ``size`` bytes."""
    _check_entries(archive, size)
    pickles = [name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl"]
    if len(pickles) != 1:
        raise _UnreadableError(f"it is a zip archive with {len(pickles)} data.pkl, expected one")
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE:
        raise _UnreadableError(f"its data.pkl is larger than {_MAX_PICKLE >> 20} MiB")
    folder = PurePosixPath(pickles[0]).parent
    order = folder / "byteorder"
    if str(order) in archive.namelist() and _record(archive, order) != b"little":
        raise _UnreadableError("it was written by a big-endian machine")
    reader = _Unpickler(
        io.BytesIO(_record(archive, PurePosixPath(pickles[0]))), archive, folder / "data"
    )
    value = reader.load()
    n_bytes = _check_values(value)
    if n_bytes > _MAX_REPEATED * reader.n_stored:
        raise _UnreadableError(
            f"its tensors take {n_bytes:,} bytes but only {reader.n_stored:,} are stored: they "
            "repeat one another"
        )
    return value


def _check_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse what torch never writes: compressed, encrypted and overlapping entries."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise _UnreadableError("it has two entries of one name")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _UnreadableError(
                f"{entry.filename!r} in it is compressed (to {entry.file_size:,} bytes when "
                "unpacked) or encrypted"
            )
    if min((entry.header_offset for entry in entries), default=0):
        raise _UnreadableError("something stands in front of the archive")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size:
        raise _UnreadableError(f"it has {size:,} bytes and claims to hold {claimed:,}")


def _record(archive: zipfile.ZipFile, name: PurePosixPath) -> bytearray:
    """Return the bytes of an entry, whose size is that of the file at most."""
    try:
        content = bytearray(archive.getinfo(str(name)).file_size)
    except KeyError:
        raise _UnreadableError(f"its part {name.name!r} is missing") from None
    view = memoryview(content)
    with archive.open(str(name)) as file:
        for start in range(0, len(content), _CHUNK):
            file.readinto(view[start : start + _CHUNK])  # type: ignore[attr-defined]
    return content


# --- the pickle ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Foreign:
    """Something of torch that is no dense tensor; called, it stays what it is."""

    kind: str

    def __call__(self, *arguments: object) -> _Foreign:
        return self


_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT",
    "GET", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1",
    "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST",
    "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE",
    "NEWOBJ", "BUILD", "BINPERSID",
)  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """Reads the pickle of a ``.pt`` file, opcode by opcode, with no more opcodes than it needs.

    The one in Python: that in C fills as much memory as a memo's index says.
    """

    stack: list[Any]

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, folder: PurePosixPath) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}
        self.n_stored = 0

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in the pickle; nothing is imported."""
        match module, name:
            case "collections", "OrderedDict":
                return _new_dict
            case "builtins" | "__builtin__", "set":
                return _Foreign("a set")
            case "torch", "Size":
                return tuple
            case "torch._utils", "_rebuild_tensor_v2":
                return self._tensor
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return _data_of_parameter
            case "torch", _ if name in _DTYPES:
                return _DTYPES[name]
        if module.partition(".")[0] == "torch":
            return _Foreign(_FOREIGN.get(name, f"{module}.{name}"))
        raise _UnreadableError(f"{_DAMAGED} ({module}.{name})")

    def persistent_load(self, identifier: Any) -> Any:
        """Return the storage that an identifier names, ``[numel]``."""
        match identifier:
            case ("storage", _Foreign() as kind, str(), str(), int()):
                return kind  # of a quantised tensor, say
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)) if numel >= 0:
                if key not in self._storages:
                    self._storages[key] = self._storage(key, dtype, numel)
                if self._storages[key].dtype != dtype:
                    raise _UnreadableError(f"its storage {key!r} is of two types")
                return self._storages[key]
        raise _UnreadableError(_DAMAGED)

    def _storage(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        content = _record(self._archive, self._folder / key)
        if len(content) != numel * dtype.itemsize:
            raise _UnreadableError(
                f"its storage {key!r} has {len(content):,} bytes and claims {numel:,} values of "
                f"{dtype.itemsize} bytes"
            )
        self.n_stored += len(content)
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any,
        metadata: Any = None,
    ) -> Any:  # fmt: skip
        """Return a part of a storage; whether it required a gradient is not looked at."""
        if isinstance(storage, _Foreign):
            return storage
        if metadata:
            return _Foreign("a tensor that is negated or conjugated when it is read")
        if len(size) != len(stride) or any(
            type(n) is not int or n < 0 for n in (offset, *size, *stride)
        ):
            raise _UnreadableError(f"a tensor in it has the impossible shape {size!r}")
        numel = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if numel and (last >= len(storage) or numel > len(storage)):
            raise _UnreadableError(
                f"a tensor in it has shape {list(size)}, more than the {len(storage):,} values "
                "that are stored for it"
            )
        return torch.as_strided(storage, size, stride, offset)

    def load_setitem(self) -> None:
        """Set an entry of a dict; see :meth:`load_setitems`."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        """Set entries of a dict whose keys are texts or numbers: others take for ever to hash."""
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._set(self.stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        keys = items[::2]
        if type(target) is not dict or not all(type(key) in (str, int, float) for key in keys):
            raise _UnreadableError(_DAMAGED)
        target.update(zip(keys, items[1::2], strict=True))

    def load_newobj(self) -> None:
        """Let an object of torch stand for itself; there are no others."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Foreign):
            raise _UnreadableError(_DAMAGED)

    def load_build(self) -> None:
        """Leave aside the attributes that a state dict carries."""
        self.stack.pop()

    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _OPCODES
    } | {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
    }


def _new_dict() -> dict[Any, Any]:
    return {}


def _data_of_parameter(data: Any, *rest: object) -> Any:
    return data


def _check_values(value: Any) -> int:
    """Refuse what is neither tensor nor plain value; return the bytes of all tensors together.

    The message names the outermost key.
    """
    pending, seen, n_bytes = [(value, "")], set(), 0
    while pending:
        value, where = pending.pop()
        if isinstance(value, Tensor):
            n_bytes += value.numel() * value.element_size()
        if id(value) in seen:  # a list may well hold itself
            continue
        seen.add(id(value))
        if isinstance(value, _Foreign):
            place = f"entry {where} is" if where else "it holds"
            raise _UnreadableError(f"{place} {value.kind}, expected dense tensors")
        if isinstance(value, dict):
            pending += [(item, where or repr(key)) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(item, where) for item in value]
        elif not isinstance(value, Tensor | str | int | float | None):
            raise _UnreadableError(f"it holds a {type(value).__name__}, expected dense tensors")
    return n_bytes
