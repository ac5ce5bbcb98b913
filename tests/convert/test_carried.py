"""What belongs to a tokenizer, a licence or a card goes along; what else there is is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_curr.cli import main
from megatron_curr.convert.carried import carry_files
from tests.convert.toy_models import save_toy

KEPT = {
    *("tekken.json", "tiktoken.model", "tokenization_kimi.py", "spoken.py", "qwen.tiktoken"),
    *("vocab.json", "merges.txt", "spiece.model", "chat_template.jinja", "tokenizer.model.v3"),
    *("NOTICE", "LICENSE.txt", "LICENCE", "MODEL_LICENSE", "USE_POLICY.md", "README.md"),
    *("additional_chat_templates", "special_tokens_map.json", "generation_config.json"),
}
LEFT = ("figure.png", "modeling_kimi.py", "original/", "params.json")
CONVERTED = (
    "config.json",
    "model.safetensors",
    "consolidated.00.pth",
    "model.safetensors.index.json",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (*KEPT, *LEFT, *CONVERTED, ".gitattributes"):
        if name == "additional_chat_templates" or name.endswith("/"):
            (folder / name).mkdir()
            (folder / name / "tool.jinja").write_text("{{ tools }}")
        else:
            (folder / name).write_text(f"{name}\n")
    (folder / "tokenization_kimi.py").write_text("from .spoken import numbers\n")
    return folder


def test_files_of_every_tokenizer_go_along_and_others_are_named(
    folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert carry_files(folder, target) == LEFT
    assert {path.name for path in target.iterdir()} == KEPT
    assert (target / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"
    assert (target / "qwen.tiktoken").read_text() == "qwen.tiktoken\n"


def test_links_of_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (folder / "NOTICE").rename(tmp_path / "blob")
    (folder / "NOTICE").symlink_to(tmp_path / "blob")
    carry_files(folder, target)
    assert (target / "NOTICE").read_text() == "NOTICE\n" and not (target / "NOTICE").is_symlink()


def test_there_and_back_keeps_them_and_a_merge_says_what_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CONVERTED:
        (folder / name).unlink()
    save_toy("llama2", folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Kimi\n")
    for source, target in (("model", "there"), ("there", "back")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), "--no-verify"]) == 0
    assert f"left behind in {folder}: {', '.join(LEFT)}" in capsys.readouterr().out
    back = {path.name for path in (tmp_path / "back").iterdir()}
    assert back == KEPT | {"config.json", "model.safetensors"}
    assert (tmp_path / "back" / "README.md").read_bytes() == (folder / "README.md").read_bytes()

    pair = [str(folder), str(tmp_path / "back")]
    merge = ["merge", str(tmp_path / "merged"), *pair, "--to", "checkpoint"]
    assert main(merge) == 0
    published = str(tmp_path / "published")
    assert main(["convert", str(tmp_path / "merged"), published, "--no-verify"]) == 0
    card = (tmp_path / "published" / "README.md").read_text()
    assert card.startswith(
        f"---\nlicense: mit\n---\n\n> The weights are the average of {pair[0]}, "
    )
    assert card.endswith("# Kimi\n")
