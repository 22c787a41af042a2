"""``.pt`` files: what is read, and the line for everything else, before any of it is made."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acdc.errors import InputError
from acdc.files.pickled import read_pt


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Return what saves a value with torch."""

    def save(value: Any, **options: Any) -> Path:
        torch.save(value, tmp_path / "x.pt", **options)
        return tmp_path / "x.pt"

    return save


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_pt(path)
    return str(caught.value)


def with_entry(path: Path, ending: str, change: Callable[[bytes], bytes], **options: Any) -> Path:
    """Write an archive again with one of its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith(ending) else content)
    return path


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_of_torch(dtype: torch.dtype, protocol: int, saved: Any) -> None:
    x = (torch.arange(24).view(2, 3, 4) % 2).to(dtype)
    value = {
        "whole": x, "view": x[1, ::2, 1:3].T, "scalar": x[0, 0, 1], "empty": x[:0],
        "same": x, "other": [x + 1, (3, 2.5, None, True, "é", 2**70)],
    }  # fmt: skip
    path = saved(value, pickle_protocol=protocol)
    got, expected = read_pt(path), torch.load(path, weights_only=False)
    assert got.keys() == expected.keys()
    for key in ("whole", "view", "scalar", "empty", "same"):
        assert torch.equal(got[key], expected[key])
        assert got[key].dtype == dtype
    assert torch.equal(got["other"][0], expected["other"][0])
    assert got["other"][1] == expected["other"][1]


def test_state_dicts_and_parameters_come_without_gradients(saved: Any) -> None:
    module = torch.nn.Linear(3, 4)
    state = read_pt(saved(module.state_dict()))
    assert torch.equal(state["weight"], module.weight)
    for value in (module.weight, torch.ones(3, requires_grad=True)):
        got = read_pt(saved({"x": value}))["x"]
        assert type(got) is torch.Tensor
        assert not got.requires_grad
        assert torch.equal(got, value)


def unusual() -> dict[str, tuple[Any, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta, deprecated
        rows = [torch.ones(3), torch.ones(2)]
        return {
            "sparse": (torch.eye(3).to_sparse(), "a sparse tensor"),
            "compressed": (torch.eye(3).to_sparse_csr(), "a sparse tensor"),
            "meta": (torch.empty(3, device="meta"), "a meta tensor, which has no values"),
            "quantised": (
                torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantised tensor"
            ),
            "nested": (torch.nested.nested_tensor(rows), "a nested tensor"),
            "jagged": (
                torch.nested.nested_tensor(rows, layout=torch.jagged), "a tensor of a class of its"
            ),
            "float8": (torch.ones(3).to(torch.float8_e4m3fn), "a tensor of a type that models do"),
            "conjugated": (torch.ones(3, dtype=torch.complex64).conj(), "negated or conjugated"),
            "negated": (torch.ones(3, dtype=torch.complex64).conj().imag, "negated or conjugated"),
            "set": ({1, 2}, "a set"),
            "dtype": (torch.float32, "torch.float32"),
        }  # fmt: skip


@pytest.mark.parametrize("kind", unusual())
def test_unusual_tensors_are_refused_by_name(kind: str, saved: Any) -> None:
    value, words = unusual()[kind]
    path = saved({"fine": torch.ones(2), "blocks.0.W": value})
    message = refusal(path)
    assert message.startswith(f"{path} cannot be read as plain tensors: entry 'blocks.0.W' is ")
    assert words in message


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@pytest.mark.parametrize("value", [_Evil(), {"x": _Evil()}, torch.nn.Linear(2, 2), Path("x")])
def test_nothing_is_executed(value: Any, saved: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read as plain tensors: " in refusal(saved(value))
    assert "executed" not in capfd.readouterr().out


def test_a_file_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    """0.8 MB that were 800 MB."""
    torch.save({"x": torch.zeros(1000)}, tmp_path / "x.pt")
    path = with_entry(
        tmp_path / "x.pt", "data/0", lambda content: bytes(800 << 20),
        compression=zipfile.ZIP_DEFLATED,
    )  # fmt: skip
    assert path.stat().st_size < 1 << 20
    message = refusal(path)
    assert "is compressed" in message


def test_overlapping_entries_are_refused(saved: Any) -> None:
    """A central directory that names one entry of 4 MB a hundred times."""
    path = saved({"x": torch.zeros(1 << 20)})
    with zipfile.ZipFile(path) as archive:
        big = max(archive.infolist(), key=lambda entry: entry.file_size)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(100):
            again = zipfile.ZipInfo(f"x/data/{i + 5}")
            again.CRC, again.header_offset = big.CRC, big.header_offset
            again.file_size = again.compress_size = big.file_size
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    assert "claims to hold" in refusal(path)


def test_a_tensor_larger_than_its_storage(saved: Any) -> None:
    assert "has shape [1000000000], more than the 1 values" in refusal(
        saved({"x": torch.ones(1).expand(10**9)})
    )
    path = saved({"x": torch.ones(100)})
    assert "its storage '0' has 400 bytes and claims 25,700 values of 4 bytes" in refusal(
        with_entry(path, "data.pkl", lambda content: content.replace(b"Kd", b"Md\x64"))
    )


def test_tensors_that_repeat_one_another(saved: Any) -> None:
    x = torch.ones(1000)
    read_pt(saved({"embed": x.view(10, 100), "unembed": x.view(100, 10)}))
    message = refusal(saved({str(i): x for i in range(500)}))
    assert "its tensors take 2,000,000 bytes but only 4,000 are stored" in message


def test_the_format_of_before_torch_1_6(saved: Any) -> None:
    path = saved({"x": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert "it is in the format of torch before 1.6; save it again" in refusal(path)


def archive_of(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo of four billion entries
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # a byte array of 1 TiB
        b"\x80\x02ccollections\nOrderedDict\n)R(K\x00)K\x01u.",  # a tuple as a key
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x80\x02}", b"", b"K", b".", b"0.", b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.",
    ],
)  # fmt: skip
def test_pickles_of_nonsense(content: bytes, tmp_path: Path) -> None:
    message = refusal(archive_of(tmp_path / "x.pt", content))
    assert "cannot be read as plain tensors: " in message


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    value = read_pt(archive_of(tmp_path / "x.pt", b"\x80\x02]q\x00h\x00a."))
    assert value[0] is value


def test_keys_that_would_take_for_ever_to_hash(tmp_path: Path) -> None:
    """Forty tuples, each twice the one before: 2^40 steps to hash."""
    opcodes = [b"\x80\x02}", b")q\x00"]
    opcodes += [
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(40)
    ]
    content = b"".join(opcodes) + b"K\x01s."
    assert "cannot be read" in refusal(archive_of(tmp_path / "x.pt", content))


def test_an_archive_behind_something_else(saved: Any) -> None:
    path = saved({"x": torch.ones(2)})
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert "something stands in front of the archive" in refusal(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    for content in (b"", b"no archive", pickle.dumps(print)):
        (tmp_path / "x.pt").write_bytes(content)
        assert "it is truncated or damaged, or holds other objects" in refusal(tmp_path / "x.pt")
    assert "No such file" in refusal(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "w"):
        pass
    assert "0 data.pkl" in refusal(tmp_path / "x.pt")
