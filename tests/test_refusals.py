"""Models that are refused are told what is missing, and which ones are not."""

import pytest
import torch
import transformers as hf

from offramp import SplitModel, UnsupportedModelError
from offramp.families import FAMILIES

SIZES = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PART = {name: SIZES[name] for name in list(SIZES)[1:5]}
REFUSED = {
    "recurrent layers between others": (
        ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"] * 2}),
        r"layers of type conv, which see or keep something else than keys and values .* full and sliding-window",
    ),
    "recurrent layers": (("MambaConfig", "MambaForCausalLM", {}), "layers of type linear_attention"),
    "a state that no layer type tells of": (("RwkvConfig", "RwkvForCausalLM", {}), "it is recurrent"),
    "chunks": (
        ("Llama4TextConfig", "Llama4ForCausalLM", {"layer_types": ["chunked_attention"] * 4, "num_local_experts": 2}),
        "layers of type chunked_attention",
    ),
    "blocks that ask for more": (
        ("BloomConfig", "BloomForCausalLM", {}),
        r"no row .*\(its blocks are BloomBlock at transformer.h, which ask for alibi; it has no model.layers, no final "
        r"norm called norm, no self_attn.k_proj in a block",
    ),
    "other attention": (
        ("GPTJConfig", "GPTJForCausalLM", {"rotary_dim": 4}),
        r"no row .*GPTJBlock at transformer.h; it has no model.layers, .*no self_attn.k_proj",
    ),
    "one that looks like most": (
        ("StableLmConfig", "StableLmForCausalLM", {}),
        r"no row .*StableLmDecoderLayer at model.layers; its parts are where most families have them",
    ),
    "images": (
        ("Gemma3Config", "Gemma3ForConditionalGeneration", {"text_config": PART, "vision_config": PART}),
        "takes more than text; its text part is of type 'gemma3_text', which alone is supported",
    ),
    "no generation": (("BertConfig", "BertModel", {}), "does not generate text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_is_missing(case):
    (config, model, options), says = REFUSED[case]
    with torch.device("meta"):
        made = getattr(hf, model)(getattr(hf, config)(**{**SIZES, **options}))
    with pytest.raises(UnsupportedModelError, match=says) as error:
        SplitModel(made)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{model} (model type '{made.config.model_type}') is not supported: ")
    names = (
        message.rpartition("supported are ")[2].replace(" (encoder-decoder)", "").replace(" (decoder-only) and", ",")
    )
    assert sorted(names.split(", ")) == sorted(FAMILIES)


def test_a_supported_family_with_strange_layers_is_refused():
    config = hf.Gemma3TextConfig(**SIZES, head_dim=4, use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match="Gemma3ForCausalLM is not supported.*bidirectional attention"):
        SplitModel(hf.Gemma3ForCausalLM(config))
