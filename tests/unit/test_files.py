"""Files are replaced whole or not at all, and messages of foreign errors become one line."""

import json
import os
import stat

import pytest

from slimlstm import files
from slimlstm.errors import reason_of
from slimlstm.files import replacing, write_json, write_text


@pytest.fixture
def target(tmp_path):
    """A file with an old content, alone in its folder."""
    path = tmp_path / "numbers.json"
    path.write_text("old")
    return path


def names_beside(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def test_the_old_content_is_whole_until_the_new_one_is(target):
    with replacing(target) as draft:
        draft.write_text("ne")
        assert target.read_text() == "old"
        draft.write_text("new")
    assert target.read_text() == "new"
    assert names_beside(target) == ["numbers.json"]


class FullDiskError(OSError):
    """Stands for any failure while a file is written."""


@pytest.mark.parametrize("error", [FullDiskError, KeyboardInterrupt])
def test_after_an_exception_the_old_content_stays_and_the_draft_goes(error, target):
    with pytest.raises(error), replacing(target) as draft:
        draft.write_text("ne")
        raise error
    assert target.read_text() == "old"
    assert names_beside(target) == ["numbers.json"]


def test_a_draft_that_its_writer_removed_is_an_error_and_the_old_content_stays(target):
    with pytest.raises(FileNotFoundError), replacing(target) as draft:
        draft.unlink()
    assert target.read_text() == "old"


def test_writers_of_the_same_file_have_drafts_of_their_own(target):
    with replacing(target) as first, replacing(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the outer block ends last
    assert names_beside(target) == ["numbers.json"]


def test_a_draft_lies_beside_its_file_and_has_its_ending(target):
    with replacing(target) as draft:
        assert (draft.parent, draft.suffix) == (target.parent, ".json")
        draft.write_text("new")


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask_even_if_the_writer_is_stricter(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "weights") as draft:
            draft.unlink()
            os.close(os.open(draft, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == mode


def test_file_and_folder_are_flushed_around_the_renaming(target, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path, target.read_text())))
    with replacing(target) as draft:
        draft.write_text("new")
    assert flushed == [(draft, "old"), (target.parent, "new")]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "text", "ä\n")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "ä\n".encode()


def test_drafts_of_killed_processes_are_removed_and_others_stay(target):
    abandoned, recent = (target.with_name(f".numbers.{age}.draft.json") for age in ("old", "new"))
    foreign = target.with_name(".letters.old.draft.json")
    for draft in (abandoned, recent, foreign):
        draft.touch()
    for draft in (abandoned, foreign):
        os.utime(draft, (0, 0))
    write_text(target, "new")
    assert names_beside(target) == sorted([recent.name, foreign.name, "numbers.json"])


def test_json_is_written_indented_and_ends_with_a_newline(target):
    write_json(target, {"a": [1, 2.5, None]})
    assert json.loads(target.read_text()) == {"a": [1, 2.5, None]}
    assert target.read_text().endswith("]\n}\n")


def test_content_that_is_not_json_leaves_the_old_file(target):
    with pytest.raises(TypeError):
        write_json(target, {"a": object()})
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("one line"), "one line"),
        (ValueError("\n  first \nsecond"), "first"),
        (KeyError(), "KeyError"),
        (ValueError("  \n "), "ValueError"),
        (ValueError("red \x1b[31m alarm\x07"), "red ?[31m alarm?"),
        (ValueError("a" * 300), "a" * 300),
        (ValueError("a" * 301), "a" * 297 + "..."),
    ],
    ids=["one line", "several", "none", "blank", "control characters", "long", "too long"],
)
def test_the_reason_of_an_error_is_its_first_line(error, reason):
    assert reason_of(error) == reason
