"""Architectures that people ask for and that our models cannot be exactly, each with its reason."""

from __future__ import annotations

_GATED_DELTA = "linear attention by gated delta rules, which our layers are not"
_STATE_SPACE = "state-space layers, which ours are not"
_INDEXER = "an indexer that chooses which keys a query sees"
_IMAGES = "it reads images; the text model alone may be of an architecture that converts"
_POSITIONS = "a learned table of positions, where our models rotate"
_OUTPUT_BIAS = "a bias of the output layer, which ours have not"
_ALIBI = "positions as biases of scores (ALiBi), where our models rotate"
_LLAMA_4 = (
    "attention in chunks, scores that grow with the position, and experts whose input is weighted"
)

REFUSED = {
    "ApertusForCausalLM": "an activation with parameters of its own (xIELU)",
    "BambaForCausalLM": _STATE_SPACE,
    "BloomForCausalLM": _ALIBI,
    "DeepseekV32ForCausalLM": _INDEXER,
    "DeepseekV4ForCausalLM": _INDEXER,
    "FalconH1ForCausalLM": _STATE_SPACE,
    "FalconMambaForCausalLM": _STATE_SPACE,
    "GPT2LMHeadModel": _POSITIONS,
    "GPTBigCodeForCausalLM": _POSITIONS,
    "GPTJForCausalLM": _OUTPUT_BIAS,
    "Gemma2ForCausalLM": "soft caps of scores and logits, which our attention has not",
    "Gemma3ForConditionalGeneration": _IMAGES,
    "Gemma3nForCausalLM": "embeddings of every layer, and states side by side",
    "GlmMoeDsaForCausalLM": _INDEXER,
    "GptOssForCausalLM": "sinks in the softmax of attention, biases of experts and clipped gates",
    "GraniteMoeHybridForCausalLM": _STATE_SPACE,
    "InternLM2ForCausalLM": "transformers has no class of it; saved as a LlamaForCausalLM, which "
    "its authors have a tool for, it converts",
    "JambaForCausalLM": _STATE_SPACE,
    "KimiLinearForCausalLM": _GATED_DELTA,
    "KimiVLForConditionalGeneration": _IMAGES,
    "Kimi_K25ForConditionalGeneration": _IMAGES,
    "Llama4ForCausalLM": _LLAMA_4,
    "Llama4ForConditionalGeneration": f"{_IMAGES}; Llama 4's does not: {_LLAMA_4}",
    "Mamba2ForCausalLM": _STATE_SPACE,
    "MambaForCausalLM": _STATE_SPACE,
    "Mistral3ForConditionalGeneration": _IMAGES,
    "MllamaForConditionalGeneration": _IMAGES,
    "MptForCausalLM": _ALIBI,
    "NemotronHForCausalLM": _STATE_SPACE,
    "OPTForCausalLM": _POSITIONS,
    "OlmoForCausalLM": "norms without weights",
    "OlmoHybridForCausalLM": _GATED_DELTA,
    "Phi4MultimodalForCausalLM": _IMAGES,
    "PhiForCausalLM": _OUTPUT_BIAS,
    "Qwen2MoeForCausalLM": "a gate of the shared experts, which ours have not",
    "Qwen3NextForCausalLM": f"{_GATED_DELTA}; a gate of attention's output",
    "Qwen3_5ForCausalLM": f"{_GATED_DELTA}; a gate of attention's output",
    "Qwen3_5MoeForCausalLM": f"{_GATED_DELTA}; a gate of attention's output",
}
"""Architecture to what it has that our models have not."""
