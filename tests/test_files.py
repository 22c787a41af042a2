"""Reading files of unknown origin, and showing what they hold on one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from graphs.errors import CircuitFileError, InputError
from graphs.files.whole import (
    MIB,
    check_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    write_whole,
)
from graphs.text import MOST_SHOWN, one_line, printable


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_bytes(path, 11) == path.read_bytes()
    assert read_text(path, 11) == '{"a": 1}'
    assert read_json(path, 11) == {"a": 1}


def test_a_file_over_its_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(3 * MIB)  # sparse: nothing is on the disk
    with pytest.raises(CircuitFileError, match="has 3 MiB, expected at most 2: is it the right"):
        read_bytes(path, 2 * MIB, CircuitFileError)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/urandom", "/dev/stdin"])
def test_a_device_is_no_file(path: str) -> None:
    if not Path(path).exists() or Path(path).is_file():
        pytest.skip(f"{path} is no device here")
    with pytest.raises(InputError, match="it is a device, pipe or socket, expected a file"):
        read_bytes(path, MIB)


def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="it is a device, pipe or socket, expected a file"):
        read_text(tmp_path / "pipe", MIB)


def test_a_folder_or_nothing_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder, expected a file"):
        check_regular(tmp_path, MIB)
    with pytest.raises(InputError, match=r"cannot read .*nothing: No such file"):
        check_regular(tmp_path / "nothing", MIB)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_path_has_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match="no path has such a name"):
        read_bytes(name, MIB)


def test_a_file_of_the_kernel_without_a_size_is_refused() -> None:
    if not Path("/proc/self/environ").is_file():
        pytest.skip("no /proc here")
    with pytest.raises(InputError, match="its size changes while it is read"):
        read_bytes("/proc/self/environ", MIB)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff", "can't decode byte 0xff"),
        ('{"a"', "Expecting ':' delimiter at line 1, column 5"),
        ("[" * 100_000, "recursion depth"),
        ("1" + 5000 * "0", "Exceeds the limit"),
        ('{"prompt": ["\\ud83d"]}', r"lone surrogate, '\\ud83d'"),
        ('{"\\uDE00": 1}', r"lone surrogate, '\\ude00'"),
    ],
)
def test_json_that_cannot_be_read(text: str | bytes, words: str) -> None:
    with pytest.raises(CircuitFileError, match=words):
        parse_json(text, "file", CircuitFileError)


def test_surrogates_in_pairs_are_characters() -> None:
    assert parse_json('"\\ud83d\\ude00"', "file") == "😀"
    assert parse_json('"\\\\ud83d"', "file") == "\\ud83d"


def test_a_line_has_no_control_characters_and_is_bounded() -> None:
    said = str(InputError("got\x1b[2J\x07 \x9b31m \u202e \ud800\n" + 10_000 * "a" + ": correct it"))
    assert said.isprintable()
    assert len(said) < MOST_SHOWN
    assert said.startswith(r"got\x1b[2J\x07 \x9b31m \u202e \ud800 aaa")
    assert said.endswith("aaa: correct it")


def test_usual_text_stays_as_it_is() -> None:
    assert printable("Zürich ▁the 日本 😀") == "Zürich ▁the 日本 😀"
    assert printable("a\n\tb\x00", keep="\n\t") == "a\n\tb\\x00"
    assert one_line("a  b\r\n c ") == "a b c"


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: it is no file but a folder, device or pipe"):
        write_whole(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    (tmp_path / "new").symlink_to(tmp_path / "nowhere")
    write_whole(tmp_path / "new", "text")
    assert (tmp_path / "new").read_text() == "text"
