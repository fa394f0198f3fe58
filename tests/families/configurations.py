"""A model of a few thousand weights for each family that people fine-tune."""

from dataclasses import dataclass
from typing import Any

_PLAIN = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SHARED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 8,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Family:
    """A family of models, and the configuration of a small one."""

    title: str
    config: dict[str, Any]


def _family(title: str, kind: str, *parts: dict[str, Any], base: dict[str, Any] = _PLAIN, **others: Any) -> Family:
    fields: dict[str, Any] = {}
    for part in (base, *parts, others, {"model_type": kind}):
        fields |= part
    return Family(title, fields)


FAMILIES: tuple[Family, ...] = (
    _family("GPT-2", "gpt2", base=_GPT2),
    _family("GPT-J", "gptj", base=_GPT2, rotary_dim=4),
    _family("GPT-Neo", "gpt_neo", num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8),
    _family("GPT-NeoX, Pythia", "gpt_neox"),
    _family("StarCoder", "gpt_bigcode", base=_GPT2),
    _family("StarCoder2", "starcoder2"),
    _family("OPT", "opt", ffn_dim=32, word_embed_proj_dim=16),
    _family("BLOOM", "bloom", base={"vocab_size": 300, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    _family("Falcon", "falcon"),
    _family("MPT", "mpt", base={"vocab_size": 300, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}),
    _family("Llama 1 to 3", "llama"),
    _family("Llama with YaRN", "llama", rope_parameters=_YARN),
    _family("Llama with dynamic scaling", "llama", rope_parameters=_DYNAMIC, max_position_embeddings=8),
    _family("Mistral", "mistral", _WINDOW),
    _family("Ministral", "ministral", _HEADS, _WINDOW),
    _family("Qwen 2 and 2.5", "qwen2", tie_word_embeddings=True),
    _family("Qwen 3", "qwen3", _HEADS),
    _family("Gemma", "gemma", _HEADS),
    _family("Gemma 2", "gemma2", _HEADS, _WINDOW),
    _family("Gemma 3", "gemma3_text", _HEADS, _WINDOW),
    _family("Phi 1 and 2", "phi"),
    _family("Phi 3 and 4", "phi3"),
    _family("Phi 3 with LongRoPE", "phi3", rope_parameters=_LONG, original_max_position_embeddings=8),
    _family("StableLM", "stablelm"),
    _family("OLMo", "olmo"),
    _family("OLMo 2", "olmo2"),
    _family("OLMo 3", "olmo3", _WINDOW),
    _family("Cohere", "cohere"),
    _family("Cohere 2", "cohere2", _WINDOW),
    _family("Granite", "granite"),
    _family("SmolLM 3", "smollm3"),
    _family("GLM 4", "glm4", _HEADS),
    _family("EXAONE 4", "exaone4", _WINDOW),
    _family("Nemotron", "nemotron"),
    _family("Mixtral", "mixtral", _LOCAL_EXPERTS, router_jitter_noise=0.1),
    _family("Qwen 2 MoE", "qwen2_moe", _EXPERTS, shared_expert_intermediate_size=24, decoder_sparse_step=1),
    _family("Qwen 3 MoE", "qwen3_moe", _EXPERTS, decoder_sparse_step=1, mlp_only_layers=[]),
    _family("OLMoE", "olmoe", num_experts=4, num_experts_per_tok=2),
    _family("gpt-oss", "gpt_oss", _LOCAL_EXPERTS, _HEADS, _WINDOW),
    _family("DeepSeek V2", "deepseek_v2", _SHARED_EXPERTS, _LATENT, topk_method="greedy"),
    _family("DeepSeek V3 and R1", "deepseek_v3", _SHARED_EXPERTS, _LATENT),
    _family("GLM 4 MoE", "glm4_moe", _SHARED_EXPERTS),
    _family("Granite MoE", "granitemoe", _LOCAL_EXPERTS),
    _family("Phi 3.5 MoE", "phimoe", _LOCAL_EXPERTS),
    _family("LFM 2", "lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3),
    _family(
        "RecurrentGemma",
        "recurrent_gemma",
        lru_width=16,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
    ),
    _family("Mamba", "mamba", base={"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
)
BY_TITLE = {family.title: family for family in FAMILIES}
