"""Tiny random models of every supported family, and what `transformers` makes of them."""

import copy
from collections.abc import Callable
from functools import cache

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import GenerationMixin

from offramp.families import FAMILIES as SUPPORTED

VOCABULARY = 97
LAYERS = 4


def _decoder(config: str, model: str, **options) -> Callable:
    def make():
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return with_biases(getattr(hf, model)(getattr(hf, config)(**{**sizes, **options})))

    return make


def _t5(config: str, model: str, **options) -> Callable:
    def make():
        sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 5, "num_heads": 4}
        sizes |= {"num_decoder_layers": LAYERS, "decoder_start_token_id": 0, "initializer_factor": 0.6}
        return getattr(hf, model)(getattr(hf, config)(**{**sizes, **options}))

    return make


_SPEECH_AND_TEXT = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.3,
}


def _bart():
    model = hf.BartForConditionalGeneration(hf.BartConfig(**_SPEECH_AND_TEXT, max_position_embeddings=64))
    model.final_logits_bias.normal_()
    return model


def _whisper():
    config = hf.WhisperConfig(
        **_SPEECH_AND_TEXT, max_source_positions=20, max_target_positions=64, num_mel_bins=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


_GEMMA = {
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 4.0,
    "query_pre_attn_scalar": 8,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
_EXPERTS = {"num_local_experts": 5, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.6,
}


def _gpt2(**options):
    sizes = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return lambda: with_biases(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **tokens, initializer_range=0.3, **options)))


def _opt(**options):
    sizes = {"ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.3}
    return _decoder("OPTConfig", "OPTForCausalLM", **sizes, **options)


def with_biases(model):
    """Random biases, which new models have as zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("bias", "sinks") or name.endswith("_bias"):
                parameter.normal_(std=0.3)
    return model


MAKERS: dict[str, Callable] = {
    "llama": _decoder("LlamaConfig", "LlamaForCausalLM"),
    "llama-tied": _decoder("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True),
    "llama-3": _decoder("LlamaConfig", "LlamaForCausalLM", rope_parameters=_LLAMA3_ROPE, attention_bias=True),
    "mistral": _decoder("MistralConfig", "MistralForCausalLM", sliding_window=5),
    "qwen2": _decoder("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": _decoder("Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    "gemma3": _decoder("Gemma3TextConfig", "Gemma3ForCausalLM", **_GEMMA),
    "phi3": _decoder("Phi3Config", "Phi3ForCausalLM", sliding_window=None),
    "olmo2": _decoder("Olmo2Config", "Olmo2ForCausalLM"),
    "smollm3": _decoder("SmolLM3Config", "SmolLM3ForCausalLM", no_rope_layer_interval=2),
    "cohere": _decoder("CohereConfig", "CohereForCausalLM", logit_scale=1.5, use_qk_norm=True),
    "cohere2": _decoder("Cohere2Config", "Cohere2ForCausalLM", logit_scale=1.5, **_WINDOWS),
    "ernie4.5": _decoder("Ernie4_5Config", "Ernie4_5ForCausalLM", head_dim=8, use_bias=True),
    "exaone4": _decoder("Exaone4Config", "Exaone4ForCausalLM", head_dim=8, **_WINDOWS),
    "gemma": _decoder("GemmaConfig", "GemmaForCausalLM", head_dim=8),
    "gemma2": _decoder("Gemma2Config", "Gemma2ForCausalLM", attn_logit_softcapping=2.0, **_GEMMA),
    "glm": _decoder("GlmConfig", "GlmForCausalLM", head_dim=8, rope_parameters=_PARTIAL_ROPE),
    "glm4": _decoder("Glm4Config", "Glm4ForCausalLM", head_dim=8, rope_parameters=_PARTIAL_ROPE),
    "gpt2": _gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt-neox": _decoder("GPTNeoXConfig", "GPTNeoXForCausalLM", rope_parameters=_PARTIAL_ROPE),
    "gpt-neox-serial": _decoder("GPTNeoXConfig", "GPTNeoXForCausalLM", use_parallel_residual=False),
    "gpt-oss": _decoder(
        "GptOssConfig", "GptOssForCausalLM", head_dim=8, rope_parameters=_YARN_ROPE, **_WINDOWS, **_EXPERTS
    ),
    "granite": _decoder("GraniteConfig", "GraniteForCausalLM", **_GRANITE),
    "granitemoe": _decoder("GraniteMoeConfig", "GraniteMoeForCausalLM", **_GRANITE, **_EXPERTS),
    "ministral": _decoder("MinistralConfig", "MinistralForCausalLM", head_dim=8, **_WINDOWS),
    "mixtral": _decoder("MixtralConfig", "MixtralForCausalLM", **_EXPERTS),
    "nemotron": _decoder("NemotronConfig", "NemotronForCausalLM", rope_parameters=_PARTIAL_ROPE),
    "olmo": _decoder("OlmoConfig", "OlmoForCausalLM", clip_qkv=0.8),
    "olmo3": _decoder("Olmo3Config", "Olmo3ForCausalLM", **_WINDOWS),
    "olmoe": _decoder("OlmoeConfig", "OlmoeForCausalLM", clip_qkv=0.8, **_EXPERTS),
    "opt": _opt(),
    "opt-350m": _opt(word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": _decoder("PhiConfig", "PhiForCausalLM", rope_parameters=_PARTIAL_ROPE, qk_layernorm=True),
    "qwen2-moe": _decoder(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        **_EXPERTS,
    ),
    "qwen3-moe": _decoder("Qwen3MoeConfig", "Qwen3MoeForCausalLM", head_dim=8, **_EXPERTS),
    "seed-oss": _decoder("SeedOssConfig", "SeedOssForCausalLM", head_dim=8),
    "starcoder2": _decoder("Starcoder2Config", "Starcoder2ForCausalLM", sliding_window=5),
    "t5": _t5("T5Config", "T5ForConditionalGeneration"),
    "t5-v1.1": _t5("T5Config", "T5ForConditionalGeneration", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": _t5("MT5Config", "MT5ForConditionalGeneration", feed_forward_proj="gated-gelu"),
    "bart": _bart,
    "whisper": _whisper,
}
FAMILIES = tuple(MAKERS)
KINDS = tuple(
    name
    for name in FAMILIES
    if name not in {
        "ernie4.5", "exaone4", "gemma", "glm", "glm4", "gpt-neox-serial", "granitemoe", "ministral", "mixtral",
        "nemotron", "olmo", "olmo3", "olmoe", "opt", "qwen3-moe", "seed-oss", "starcoder2",
    }
)  # fmt: skip
"""At least one of each kind of architecture, for what stands on the contract of families and is costly."""
DECODER_ONLY = FAMILIES[: FAMILIES.index("t5")]
ENCODER_DECODER = FAMILIES[FAMILIES.index("t5") :]


@cache
def tiny(name: str):
    """The model of that name; do not change it, tests share it."""
    torch.manual_seed(sum(map(ord, name)))
    model = MAKERS[name]().eval()
    model.generation_config.max_length = None
    return model


def llama_of_blocks(seed: int = 0, **options):
    """A new Llama whose rows are whole blocks of 32 numbers, as llama.cpp's formats have them."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3, tie_word_embeddings=True, rms_norm_eps=1e-5, **options,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def truncated(model, layers: int):
    """A copy of a model whose decoder has only its first blocks: the reference for a static exit."""
    model = copy.deepcopy(model)
    config = model.config
    if config.model_type in ("t5", "mt5"):
        model.decoder.block = model.decoder.block[:layers]
        model.decoder.config.num_layers = layers
    elif config.is_encoder_decoder:
        model.model.decoder.layers = model.model.decoder.layers[:layers]
        config.decoder_layers = layers
    else:
        family = SUPPORTED[config.model_type]
        decoder = model.get_submodule(family.decoder)
        setattr(decoder, family.layers, getattr(decoder, family.layers)[:layers])
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return model


@cache
def shortened(name: str, layers: int):
    """The model of that name, only its first layers; do not change it, tests share it."""
    return tiny(name) if layers == LAYERS else truncated(tiny(name), layers)


def eager(name):
    """The tiny model with attention and experts that the counter sees (it counts nothing for fused kernels on CPU)."""
    model = copy.deepcopy(tiny(name))
    model.set_attn_implementation("eager")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


def inputs_for(name: str, batch: int = 1, *, padded: bool = False, length: int = 9, seed: int = 0):
    """Inputs of a batch; `padded` pads all rows but the first, on the side the family pads on."""
    generator = torch.Generator().manual_seed(seed)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):
            cut = slice(0, row) if name in DECODER_ONLY else slice(length - row, length)
            mask[row, cut] = 0
        pad = tiny(name).config.pad_token_id
        ids = torch.where(mask.bool(), ids, pad)
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, inputs, max_new_tokens: int = 12, **options):
    """What `transformers` generates greedily."""
    options = {"do_sample": False, "num_beams": 1, **options}
    return GenerationMixin.generate(model, **inputs, max_new_tokens=max_new_tokens, **options)


def batch_cases():
    """(batch, padded): one row, four rows, four rows of which three are padded."""
    return [(1, False), (4, False), (4, True)]


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer(*, chat: bool = True):
    """A tokenizer of single words for the tiny decoder-only models: ids 0 <pad>, 1 <s>, 2 </s>, 3 <unk>, then words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "the", "sky", "is", "blue", "why", "?", "."]
    words += [f"w{i}" for i in range(len(words), VOCABULARY)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def character_tokenizer():
    """A tokenizer of single characters for the tiny models; the stopping rules for texts need to spell."""
    characters = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 32 + VOCABULARY - 4))]
    core = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = Split(Regex("."), "isolated"), Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, **names)
