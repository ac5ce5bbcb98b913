"""The fastest library that gives exactly the ids of the one that defines the tokenizer.

A fast engine is used only after it was compared with the reference: on every code point and added
token (``engine_proof.py``), on hard strings, and on a sample of the run's own input. On a
difference that a guard cannot keep from it the next one is tried, and the reference at last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from data_tools.engine_proof import prove
from data_tools.engines import (
    EVERY_TEXT,
    FAST_ENGINES,
    Engine,
    Flat,
    ReferenceEngine,
    Routes,
    first_difference,
    guarded,
)
from megatron_curr.data.tokenizer import Tokenizer
from megatron_curr.errors import DataError


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which engine was chosen and what that rests on; recorded in the manifest."""

    engine: str
    version: str
    reference: str
    reference_version: str
    compared_documents: int
    compared_chars: int
    routes: Routes = EVERY_TEXT
    passed_over: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        routed = {
            "code_points": self.routes.num_code_points,
            "added_tokens": list(self.routes.hidden),
        }
        return {**asdict(self), "routes": routed}

    def text(self) -> str:
        """One line for people."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        if self.engine == self.reference:
            return f"tokenizing with {self.engine} ({reasons or 'as asked'})"
        proof = (
            f"equal to {self.reference} on {self.compared_documents:,} texts and every code point"
        )
        if self.routes.code_points:
            proof += (
                f" but {self.routes.num_code_points:,}; texts with these go to {self.reference}"
            )
        if self.routes.hidden:
            proof += f"; texts with {', '.join(map(repr, self.routes.hidden[:3]))}"
            proof += " and others" if len(self.routes.hidden) > 3 else ""
            proof += f" go to {self.reference}"
        return f"tokenizing with {self.engine}, {proof}" + (f" ({reasons})" if reasons else "")


def choose_engine(
    tokenizer: Tokenizer,
    sample: Sequence[str],
    *,
    special_tokens: str = "text",
    wanted: str = "auto",
) -> tuple[Engine, Verdict]:
    """The engine for a run, and why. ``sample`` is texts of the run's own input.

    Raises ``DataError`` for an engine that is not known, or that was asked for and is not exact.
    """
    names = [kind.name for kind in FAST_ENGINES]
    if wanted not in ("auto", "reference", *names):
        raise DataError(f"--engine {wanted}: known are auto, reference, {', '.join(names)}")
    texts = [*hard_strings(tokenizer), *sample]
    reference = ReferenceEngine(tokenizer, allow_special=special_tokens == "allow")
    truth: Flat | None = None
    passed_over: dict[str, str] = {}
    chosen, routes = None, EVERY_TEXT
    for kind in FAST_ENGINES:
        if wanted not in ("auto", kind.name):
            continue
        try:
            proof = prove(kind, tokenizer)
            reason = proof.refusal
            if reason is None:
                fast = kind(tokenizer, proof.routes.hidden)
                mode = "allow" if special_tokens == "allow" else "text"
                truth = truth or reference.encode(texts)
                found = guarded(fast, tokenizer, mode, proof.routes).encode(texts)
                reason = _difference(truth, found, texts)
        except ImportError:
            reason = "not installed"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # each library has kinds of its own, a panic of Rust's too
            reason = f"cannot load this tokenizer ({error})"
        if reason is None:
            chosen, routes = fast, proof.routes
            break
        passed_over[kind.name] = reason
    if chosen is None and wanted in names:
        raise DataError(
            f"--engine {wanted}: {passed_over[wanted]}; leave it out to have one chosen"
        )
    engine = guarded(chosen or reference, tokenizer, special_tokens, routes)
    return engine, Verdict(
        engine=engine.name,
        version=version(engine.name),
        reference=reference.name,
        reference_version=version(reference.name),
        compared_documents=len(texts) if truth else 0,
        compared_chars=sum(map(len, texts)) if truth else 0,
        routes=routes,
        passed_over=passed_over,
    )


def _difference(truth: Flat, found: Flat, texts: Sequence[str]) -> str | None:
    wrong = first_difference(truth, found)
    return (
        None if wrong is None else f"differs from the reference, such as on {texts[wrong][:40]!r}"
    )


def hard_strings(tokenizer: Tokenizer) -> list[str]:
    """What tokenizers are known to disagree on: spaces, digits, joined marks, rare scripts."""
    special = list(tokenizer.special_tokens)[:8]
    spaces = [
        "",
        " ",
        "  ",
        "\n",
        " \n",
        "\n\n \n",
        "\t\t x",
        " " * 37 + "x",
        "x" + " " * 21,
        "\r\n\r",
    ]
    words = [
        *(
            "don't we'll I'VE it's'll 's ' s",
            "naïve café ﬁne Ǆ ß İı",
            "x\u0301\u0327 e\u0301 ñ n\u0303",
        ),
        *("1234567890 12 345 6.78e-9 ٣٤٥ ½ ²", "中文字符。日本語テキスト、한국어", "ก็ न्दी க்ஷ ខ្មែរ"),
        *(
            "👩\u200d👩\u200d👧 🏳️\u200d🌈 🇩🇪🇫 👍🏽",
            "\u00a0nbsp\u2003em\u3000wide\u200bzero\u2028line\u0085",
            "\ufeffbom\u0000nul\u0007",
        ),
        *("a\u2581b \u2581\u2581", "\U0010ffff\U000e0001 \ufffd", "\u202eabc\u202c שלום مرحبا"),
        *(
            "<0x0A> <0x41> [MASK] </ s> < s>",
            "/*--==>>::__**##!!?? ...",
            "{}[]()<>\"\"''`` \\n\\t",
            "ÀÁ" * 40,
        ),
        *(
            "a" * 300,
            "ab " * 200,
            "!?" * 150,
            "CamelCaseAndSNAKE_CASE_and-kebab",
            "https://e.org/?q=a%20b&c=#d",
        ),
    ]
    typed = [text for token in special for text in (token, f"a{token}b", f" {token} {token}")]
    return [*spaces, *words, *(f"{space}{word}" for word in words for space in (" ", "\n")), *typed]
