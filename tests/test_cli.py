import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_curr import __version__
from megatron_curr.cli import main
from megatron_curr.data.shards import ShardWriter
from megatron_curr.errors import DataError
from tests.recipe.recipes import write_recipe


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **names: object) -> None:
    """A module that a verb imports, so that the verb alone is tested."""
    module = ModuleType(name)
    for key, value in names.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_wrong_recipe_ends_with_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["doctor", str(recipe), "--set", "modle=1"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "error: --set modle=1: modle: unknown key; did you mean 'model'?\n"


def test_brackets_in_a_message_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(run: Path) -> Path:
        raise DataError(f"{run}/[red]x[/red]: truncated")

    stand_in(monkeypatch, "megatron_curr.report.build", write_report=refuse)
    assert main(["report", "run"]) == 2
    assert capsys.readouterr().err == "error: run/[red]x[/red]: truncated\n"


def test_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Path) -> Path:
        raise ZeroDivisionError

    stand_in(monkeypatch, "megatron_curr.report.build", write_report=fail)
    with pytest.raises(ZeroDivisionError):
        main(["report", "run"])


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (errno.EACCES, 2, "Permission denied: name a place that you may read and write"),
        (errno.EROFS, 2, "Read-only file system: name a place"),
        (errno.ENOTDIR, 2, "Not a directory: a file stands where a folder is needed"),
        (errno.ENOSPC, 1, "No space left on device: free some space"),
    ],
)
def test_what_the_file_system_refuses_is_a_sentence_about_a_place_the_user_knows(
    number: int,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(run: Path) -> Path:
        raise OSError(number, os.strerror(number), str(run / ".report.html.4711"))

    stand_in(monkeypatch, "megatron_curr.report.build", write_report=refuse)
    assert main(["report", "runs/a"]) == code
    assert capsys.readouterr().err.startswith(f"error: runs/a: {told}")


def test_an_os_error_that_is_no_refusal_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(run: Path) -> Path:
        raise OSError(errno.EBADF, "Bad file descriptor")

    stand_in(monkeypatch, "megatron_curr.report.build", write_report=fail)
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["report", "run"])


def test_verbs_that_write_say_where_they_may_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the place of a folder: root is refused by it as well."""
    with ShardWriter(tmp_path / "shards" / "one", np.dtype(np.uint16)) as writer:
        writer.add_document(range(9))
    (tmp_path / "text.jsonl").write_text("\n".join(f'{{"text": "word {n}"}}' for n in range(999)))
    (tmp_path / "file").touch()
    shards, text, below = tmp_path / "shards", tmp_path / "text.jsonl", tmp_path / "file"
    for verb, given, output, *options in (
        ("merge-shards", shards, below / "merged"),
        ("split-shards", shards, Path("/proc/none"), "--shard-tokens", "5"),
        ("train-tokenizer", text, below / "tokenizer", "--kind", "bpe", "--vocab-size", "300"),
    ):
        assert main([verb, str(given), "--output", str(output), *options]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {output.parent}") and "another" in told, verb


def test_interrupt_ends_with_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(run: Path) -> Path:
        raise KeyboardInterrupt

    stand_in(monkeypatch, "megatron_curr.report.build", write_report=interrupt)
    assert main(["report", "run"]) == 130


def test_unknown_verb_and_unknown_option_end_with_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert main(["doctor", "--jsno"]) == 2


def test_count_that_is_none_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", "--stop-at", "3x"]) == 2
    assert "'3x' is not a count" in " ".join(capsys.readouterr().err.split())


def test_schema_describes_sizes_presets_and_ramps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    kinds = [schema[branch]["$ref"].rpartition("/")[2] for branch in ("then", "else")]
    assert kinds == ["VideoRecipe", "Recipe"]
    assert all(schema["$defs"][kind]["additionalProperties"] is False for kind in kinds)
    assert {"required": ["preset"]} in schema["$defs"]["Model"]["anyOf"]
    assert "required" not in schema["$defs"]["Model"]
    assert "from" in schema["$defs"]["Piece"]["properties"]
    tokens = schema["$defs"]["Phase"]["properties"]["tokens"]
    assert [form["type"] for form in tokens["anyOf"]] == ["integer", "string"]


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def run_without_torch(*verb: str) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own, which fails with 99 where it has loaded torch."""
    program = (
        "import sys; from megatron_curr.cli import main; code = main(sys.argv[1:]); "
        "loaded = {'torch', 'transformers', 'megatron'} & set(sys.modules); "
        "loaded and print(loaded, file=sys.stderr); sys.exit(99 if loaded else code)"
    )
    return subprocess.run([sys.executable, "-c", program, *verb], capture_output=True, text=True)


@pytest.mark.parametrize("verb", [["--help"], ["train", "--help"], ["schema"], ["trace", "--help"]])
def test_light_verbs_start_without_torch(verb: list[str]) -> None:
    done = run_without_torch(*verb)
    assert done.returncode == 0, done.stderr


def test_shells_are_told_the_verbs_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MEGATRON_CURR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "megatron-curr tra")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = run_without_torch()
    assert set(done.stdout.split()) == {"train", "trace", "train-tokenizer"}, done.stderr
    monkeypatch.setenv("COMP_WORDS", "megatron-curr train --st")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run_without_torch().stdout.split() == ["--stop-at"]


def test_completion_is_installed_into_bash(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("megatron-curr")
    script = f"""
        {command} --install-completion > /dev/null && source "$HOME/.bashrc"
        COMP_WORDS=({command} rep); COMP_CWORD=1; _megatron_curr_completion {command}
        echo "${{COMPREPLY[@]}}"
    """
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], env=home, capture_output=True, text=True)
    assert done.stdout.split() == ["report"], done.stderr


@pytest.mark.parametrize("verb", [["convert", "runs/nope", "out"], ["merge", "out", "a", "b"]])
def test_what_is_not_there_is_told_before_torch_is_loaded(verb: list[str]) -> None:
    done = run_without_torch(*verb)
    assert done.returncode == 2, done.stderr
    assert "no such folder" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--token", "900", "--position", "0"],
        ["--token", "900", "--document", "a:0"],
        ["--position", "3", "--document", "a:0"],
        ["--count", "2", "--document", "a:0"],
    ],
)
def test_options_of_trace_that_contradict_each_other_are_refused(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "recipe.yaml", *options]) == 2
    words = " and ".join(" ".join(options[i : i + 2]) for i in (0, 2))
    found = capsys.readouterr().err
    assert "they contradict each other; give one of them" in found
    assert all(word in found for word in words.split())
