"""Folders, links and names: everything is read once, in one order, or said."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from data_tools.input_files import find_files
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import everything_in, run

NAMES = ("B.jsonl", "a.jsonl", "a-b/c.jsonl", "a/z.txt", "a/é.md", "a b/ü 1.json", "two\nlines.txt")


def write(folder: Path, names: tuple[str, ...] = NAMES) -> list[Path]:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": path.name}) + "\n")
    return [folder / name for name in names]


def found_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_files([folder]).files]


def test_the_order_is_that_of_the_names_whatever_was_made_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [
        *("B.jsonl", "a/z.txt", "a/é.md", "a b/ü 1.json", "a-b/c.jsonl", "a.jsonl"),
        "two\nlines.txt",
    ]
    made = []
    for seed in range(4):
        folder = tmp_path / str(seed) / "corpus"
        write(folder, tuple(random.Random(seed).sample(NAMES, len(NAMES))))
        assert found_in(folder) == expected
        monkeypatch.chdir(folder.parent)
        monkeypatch.setenv("LC_ALL", ("C", "de_DE.UTF-8", "tr_TR.UTF-8", "POSIX")[seed])
        run([Path("corpus")], folder.parent / "x", heldout_frac=0)
        run([Path("corpus/**/*.*")], folder.parent / "globbed" / "x", heldout_frac=0)
        made.append(everything_in(folder.parent / "x"))
        globbed = everything_in(folder.parent / "globbed" / "x")
        assert {len(globbed[n]) for n in globbed if n.endswith(".bin")} == {
            len(made[0][n]) for n in made[0] if n.endswith(".bin")
        }
    assert made[1:] == made[:1] * 3 and made[0]


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    write(folder, ("a/1.jsonl", "z/2.jsonl", "z/deep/3.jsonl"))
    write(elsewhere, ("4.jsonl", "in/5.jsonl"))
    (folder / "0_again").symlink_to("z")  # sorts before the folder itself
    (folder / "other").symlink_to(elsewhere)
    (folder / "other_again").symlink_to(elsewhere / "in")
    (folder / "a" / "up").symlink_to("..")
    (folder / "a" / "above").symlink_to(tmp_path)
    (elsewhere / "in" / "loop").symlink_to(".")
    (folder / "0.jsonl").symlink_to("a/1.jsonl")
    (folder / "6.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (folder / "7.jsonl").symlink_to("6.jsonl")
    (tmp_path / "outside.jsonl").write_text('{"text": "x"}\n')
    found = find_files([folder])
    assert [str(path.relative_to(folder)) for path in found.files] == [
        *("6.jsonl", "a/1.jsonl", "other/4.jsonl", "other/in/5.jsonl"),
        *("z/2.jsonl", "z/deep/3.jsonl"),
    ]
    assert {reason: count for reason, count in found.passed_over.items() if count} == {
        "links to folders that are read already": 3,
        "links to folders around them": 2,
        "links to files that are read already": 2,
    }
    for twice in ([folder, tmp_path / "outside.jsonl"], [elsewhere, folder / "other" / "4.jsonl"]):
        with pytest.raises(DataError, match="named twice"):
            find_files(twice)


@pytest.mark.parametrize("target", ["gone", "part.jsonl", "gone/below"])
@pytest.mark.parametrize("name", ["part.jsonl", "folder/part"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, name: str, target: str) -> None:
    write(tmp_path / "c", ("a.jsonl", "folder/b.jsonl"))
    link = tmp_path / "c" / name
    link.symlink_to(target)
    if link.exists():  # it leads to another link of this test, in the other folder
        pytest.fail("the link must lead nowhere")
    for given in (tmp_path / "c", link, f"{tmp_path}/c/**/part*"):
        with pytest.raises(DataError, match=rf"{name}: a link that leads nowhere \(to {target}\)"):
            find_files([given])


def refused_to_nobody(folder: str, given: str) -> None:
    os.chdir(folder)
    os.seteuid(65534)
    try:
        find_files([given])
    except DataError as error:
        os._exit(0 if "closed: cannot be read (Permission denied)" in str(error) else 1)
    os._exit(2)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without rights")
@pytest.mark.parametrize("given", ["c", "c/*/*.jsonl", "c/**/*.jsonl", "c/closed", "c/closed/x"])
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, given: str) -> None:
    write(tmp_path / "c", ("a/b.jsonl", "closed/d.jsonl"))
    (tmp_path / "c" / "closed").chmod(0)
    tmp_path.chmod(0o755)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=refused_to_nobody, args=(str(tmp_path), given))
    process.start()
    process.join()
    (tmp_path / "c" / "closed").chmod(0o755)
    assert process.exitcode == (0 if given != "c/closed/x" else process.exitcode)
    assert process.exitcode in (0, 1)  # an error, and none of ours


def test_what_is_no_corpus_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "c", ("a.jsonl", ".hidden.jsonl", "data.parquet/part.jsonl"))
    for name in ("b.csv", "c.csv", "d.jsonl.crc", "LICENSE"):
        (tmp_path / "c" / name).touch()
    (tmp_path / "c" / "void" / "deeper").mkdir(parents=True)
    os.mkfifo(tmp_path / "c" / "pipe.jsonl")
    found = find_files([tmp_path / "c"])
    assert [path.name for path in found.files] == [".hidden.jsonl", "a.jsonl", "part.jsonl"]
    assert {reason: count for reason, count in found.passed_over.items() if count} == {
        "files of other kinds (.csv, .crc, without suffix)": 4,
        "empty folders": 1,
        "pipes, sockets or devices": 1,
    }
    with pytest.raises(DataError, match=r"pipe\.jsonl: neither a file nor a folder"):
        find_files([tmp_path / "c" / "pipe.jsonl"])


def test_folders_without_a_corpus_are_errors_alone_and_counted_among_others(
    tmp_path: Path,
) -> None:
    write(tmp_path / "c", ("a.jsonl",))
    (tmp_path / "void").mkdir()
    assert find_files([tmp_path / "c", tmp_path / "void"]).passed_over["empty folders"] == 1
    with pytest.raises(DataError, match=r"void: no \.jsonl.*\(1 empty folders\)"):
        find_files([tmp_path / "void"])
    (tmp_path / "void" / "a.docx").touch()
    for inputs in ([tmp_path / "void"], [tmp_path / "c", tmp_path / "void"]):
        with pytest.raises(DataError, match=r"void: no \.jsonl.*\(1 files of other kinds \(\.docx"):
            find_files(inputs)


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).touch()
    with pytest.raises(DataError, match=r"caf\\xe9\.jsonl': this name is not UTF-8; rename it"):
        find_files([tmp_path])


def test_lists_hold_names_by_line_feed_alone(tmp_path: Path) -> None:
    files = write(tmp_path, ("a\u2028b.jsonl", "c\x0cd.jsonl"))
    text = "\r\n".join(map(str, files))
    (tmp_path / "all.lst").write_text(text, encoding="utf-8-sig", newline="")
    assert find_files([f"@{tmp_path}/all.lst"]).files == files
    (tmp_path / "one.lst").write_text(f"@{tmp_path}/two.lst\n")
    (tmp_path / "two.lst").write_text(f"@{tmp_path}/one.lst\n")
    with pytest.raises(DataError, match=r"one\.lst: a list that names itself"):
        find_files([f"@{tmp_path}/one.lst"])
