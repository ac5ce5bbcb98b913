"""The tutorial works as it is written: its files are saved, its commands are typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(sh|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_tutorial_works(tmp_path: Path) -> None:
    folder = str(Path(sys.executable).parent)
    here = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    told = ""
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "yaml":
            name = text.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(text)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=tmp_path,
            env=here,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        told += done.stdout
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert "it does not divide" in told  # the mistake
    assert told.count("to go on: megatron-curr train") == 1
    assert "complete: 44 steps, 90112 tokens" in told
    assert "complete: 49 steps, 100352 tokens" in told
