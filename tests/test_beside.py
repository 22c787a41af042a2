"""What killed processes leave beside an output goes; nothing else does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killed import killed_while_moving, left_by_a_killed_writer

from graphs.errors import InputError
from graphs.files.beside import beside, new_files, remove_leftovers, settle
from graphs.files.whole import write_whole

NEW = {"a": "new a", "b": "new b", "c": "new c", "deep/d": "new d"}


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill(folder: Path) -> None:
    for name, text in NEW.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_the_next_write_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_whole(path, "old")
    for _ in range(2):
        left = left_by_a_killed_writer(path)
    other = left_by_a_killed_writer(tmp_path / "out.json2")
    assert path.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == sorted([left, other, path])
    write_whole(path, "new")
    assert sorted(tmp_path.iterdir()) == sorted([other, path])
    assert path.read_text() == "new"
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_live_writer_s_folder_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with beside(path) as theirs:
        (theirs / "new").write_text("half")
        write_whole(path, "ours")
        settle(path)
        remove_leftovers(tmp_path)
        assert (theirs / "new").read_text() == "half"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_of_a_user_s_goes(tmp_path: Path) -> None:
    """Names as ours; no mark, a mark of another kind, a link to a leftover, a file."""
    path, home = tmp_path / "out.json", tmp_path / "home"
    home.mkdir()
    left = left_by_a_killed_writer(home / "out.json")
    (tmp_path / ".out.json-0000000a").mkdir()
    (tmp_path / ".out.json-0000000a" / "own").write_text("mine")
    (tmp_path / ".out.json-0000000b").mkdir()
    (tmp_path / ".out.json-0000000b" / ".being-written").write_text('{"format": "mine"}')
    (tmp_path / ".out.json-0000000c").symlink_to(left)
    (tmp_path / ".out.json-0000000d").write_text("mine")
    (tmp_path / ".out.json-0000000e").mkdir()
    (tmp_path / ".out.json-0000000e" / ".being-written").symlink_to(left / ".being-written")
    (tmp_path / ".out.json-0000000f").mkdir()
    (tmp_path / ".out.json-0000000f" / ".being-written").write_bytes(b"\xff" * 20_000)
    before = sorted(tmp_path.rglob("*"))
    write_whole(path, "new")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_killed_before_there_was_a_mark(tmp_path: Path) -> None:
    path, left = tmp_path / "out.json", tmp_path / ".out.json-0000000a"
    left.mkdir()
    write_whole(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_whose_new_folder_is_taken_for_a_leftover_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mkdir, n_taken = tmp_path / "out.json", Path.mkdir, 0

    def taken(self: Path, *arguments: int, **options: int) -> None:
        nonlocal n_taken
        mkdir(self, *arguments, **options)
        if self.name.startswith(".out.json-") and n_taken < 2:
            n_taken += 1
            settle(path)

    monkeypatch.setattr(Path, "mkdir", taken)
    write_whole(path, "new")
    assert n_taken == 2
    assert list(tmp_path.iterdir()) == [path]


def test_told_to_end_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the folder is made, and while it is being removed: nothing is left of it."""
    for name in ("mkdir", "unlink", "rmdir", "iterdir"):
        known, told = getattr(Path, name), False

        def interrupted(self: Path, *args: int, known=known, **options: int):  # type: ignore[no-untyped-def]
            nonlocal told
            found = known(self, *args, **options)
            if ".out.json-" in str(self) and not told:
                told = True
                raise SystemExit(143)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Path, name, interrupted)
            with pytest.raises(SystemExit), beside(tmp_path / "out.json") as place:
                (place / "half").write_text("x")
        assert told, name
        assert list(tmp_path.iterdir()) == [], name


@pytest.mark.parametrize("n_moved", [0, 1, 4])
@pytest.mark.parametrize("there", [False, True])
def test_what_was_all_written_appears(tmp_path: Path, n_moved: int, there: bool) -> None:
    folder, kept = tmp_path / "run", {}
    if there:
        (folder / "deep").mkdir(parents=True)
        kept = {"own": "mine", "deep/own": "mine"}
        for name, text in {**kept, "b": "old b"}.items():
            (folder / name).write_text(text)
    elif n_moved:
        pytest.skip("a new folder appears in one move")
    else:
        with pytest.raises(AssertionError):
            killed_while_moving(folder, n_moved)
        assert content(folder) == NEW
        return
    if n_moved < 4:
        killed_while_moving(folder, n_moved)
        assert set(tmp_path.iterdir()) > {folder}
        assert settle(folder)
    else:
        with new_files(folder) as new:
            fill(new)
    assert content(folder) == {**kept, **NEW}
    assert not settle(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_all_files_appear_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(KeyError), new_files(folder) as new:
        (new / "b").write_text("half" + NEW["e"])
    assert content(folder) == {"a": "old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_move_goes_on_if_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a signal: the exception comes out at the end."""
    folder, told = tmp_path / "run", False
    folder.mkdir()
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal told
        if self.name == "b" and not told:
            told = True
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_files(folder) as new:
        fill(new)
    assert content(folder) == NEW
    assert list(tmp_path.iterdir()) == [folder]


def test_long_and_odd_names(tmp_path: Path) -> None:
    for name in ("n" * 255, "\N{SNOWMAN}" * 85, "with\nline", "[a-z]*"):
        path = tmp_path / name
        left_by_a_killed_writer(path)
        write_whole(path, "new")
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*: No such file or directory"):
        write_whole(tmp_path / "none" / "file", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*: Not a directory"):
        write_whole(tmp_path / "file" / "file", "x")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_whole(tmp_path / "file", "x")
    assert not list(tmp_path.iterdir())
