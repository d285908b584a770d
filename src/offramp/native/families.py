"""The blocks of each family as the kernels run them: which of a model's own modules are what, and which are refused.

Families that differ in names alone share a function; a new one is a name more, or a short function, and never a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from offramp.families import acting
from offramp.native.blocks import Attention, Block, FeedForward
from offramp.native.kernels import NativeError
from offramp.native.weights import Part

_ATTENTION = ("self_attn", "attention", "attn")
_OUT = ("o_proj", "out_proj", "dense", "c_proj", "o")
_GATE = ("gate_proj", "wi_0")
_UP = ("up_proj", "fc1", "c_fc", "dense_h_to_4h", "wi_1", "wi")
_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "wo")
_ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn")
"""What families call the same thing."""


def _one_of(owner: Any, *names: str) -> Any:
    """The first attribute that is there; None without."""
    return next((found for name in names if (found := getattr(owner, name, None)) is not None), None)


def _cut(fused: Any, *widths: int) -> list[Part]:
    """A linear layer as several, one behind the other."""
    return [Part(fused, itemgetter(slice(*ends))) for ends in pairwise(accumulate(widths, initial=0))]


def _third(heads: int, which: int, values: Tensor) -> Tensor:
    """The queries', keys' or values' rows of a layer that keeps those of a head together: [H * 3 * w, ...]."""
    return values.view(heads, 3, -1, *values.shape[1:])[:, which].flatten(0, 1)


def _projections(module: Any, head_dim: int) -> tuple[Part, Part, Part]:
    """Queries, keys and values."""
    if (fused := _one_of(module, "qkv_proj", "c_attn")) is not None:  # Phi-3, GPT-2
        keys = head_dim * getattr(module, "num_key_value_heads", getattr(module, "num_heads", 0))
        query, key, value = _cut(fused, Part(fused).width - 2 * keys, keys, keys)
    elif (fused := getattr(module, "query_key_value", None)) is not None:  # GPT-NeoX
        heads = Part(fused).width // (3 * head_dim)
        query, key, value = (Part(fused, partial(_third, heads, which)) for which in range(3))
    else:
        query, key, value = (Part(_one_of(module, f"{name}_proj", name)) for name in "qkv")
    return query, key, value


def _feed_forward(config: Any, mlp: Any, **others: Any) -> FeedForward:
    fused, gate = getattr(mlp, "gate_up_proj", None), _one_of(mlp, *_GATE)
    if fused is not None:
        first, up = _cut(fused, *[Part(fused).width // 2] * 2)
    else:
        first, up = gate and Part(gate), Part(_one_of(mlp, *_UP))
    return FeedForward(up, Part(_one_of(mlp, *_DOWN)), _one_of(config, *_ACTIVATION), first, **others)


def _decoder(split: Any, index: int, *, interleaved: bool = False) -> Block:
    """Decoder-only blocks: attention and a feed-forward layer, one after the other or side by side."""
    block, config = split.blocks[index], split.config
    module, first = _one_of(block, *_ATTENTION), _one_of(block, "input_layernorm", "ln_1")
    second = _one_of(block, "post_attention_layernorm", "ln_2")
    if hasattr(block, "post_self_attn_layernorm"):  # GLM-4: norms around both
        norms = (first, block.post_self_attn_layernorm, second, block.post_mlp_layernorm)
    elif hasattr(block, "pre_feedforward_layernorm"):  # Gemma 2 and 3: likewise
        norms = (first, second, block.pre_feedforward_layernorm, block.post_feedforward_layernorm)
    elif hasattr(block, "post_feedforward_layernorm"):  # OLMo 2 and 3, EXAONE 4: behind both
        norms = (None, second, None, block.post_feedforward_layernorm)
    else:
        norms = (first, None, second or first, None)
    head_dim, multiplier = _one_of(module, "head_dim", "head_size"), getattr(block, "residual_multiplier", 1.0)
    attention = Attention(
        *_projections(module, head_dim), Part(_one_of(module, *_OUT)), head_dim, module.scaling, norms[0], norms[1],
        query_norm=_one_of(module, "q_norm", "q_layernorm"), key_norm=_one_of(module, "k_norm", "k_layernorm"),
        clip=getattr(config, "clip_qkv", None) or 0.0, multiplier=multiplier, window=split.windows[index] or 0,
        cap=getattr(module, "attn_logit_softcapping", None) or 0.0,
        rotary=split.rotary is not None and split.family.rotates(block), interleaved=interleaved,
    )  # fmt: skip
    mlp = _feed_forward(config, block.mlp, before=norms[2], after=norms[3], multiplier=multiplier)
    beside = getattr(block, "use_parallel_residual", second is None)  # GPT-NeoX; Cohere and Phi with one norm for both
    return ((attention, mlp),) if beside else ((attention,), (mlp,))


def _t5(split: Any, index: int) -> Block:
    own, cross, last = split.blocks[index].layer

    def attention(module: Any, norm: Any, *, memory: bool) -> Attention:
        width = module.key_value_proj_dim
        return Attention(
            *_projections(module, width), Part(module.o), width, module.scaling, norm, memory=memory, biased=not memory
        )

    return (
        (attention(own.SelfAttention, own.layer_norm, memory=False),),
        (attention(cross.EncDecAttention, cross.layer_norm, memory=True),),
        (_feed_forward(split.config, last.DenseReluDense, before=last.layer_norm),),
    )


def _bart(split: Any, index: int) -> Block:
    """BART, whose norms stand behind the sublayers; Whisper, whose stand before them; OPT, of either kind."""
    block = split.blocks[index]
    side = "before" if getattr(block, "do_layer_norm_before", split.family.listens) else "behind"

    def attention(module: Any, norm: Any, *, memory: bool) -> Attention:
        others: dict[str, Any] = {side: norm, "memory": memory}
        return Attention(
            *_projections(module, module.head_dim), Part(module.out_proj), module.head_dim, module.scaling, **others
        )

    own = attention(block.self_attn, block.self_attn_layer_norm, memory=False)
    mlp = _feed_forward(split.config, block, **{side: block.final_layer_norm})
    if not split.is_encoder_decoder:
        return ((own,), (mlp,))
    return ((own,), (attention(block.encoder_attn, block.encoder_attn_layer_norm, memory=True),), (mlp,))


_PLAIN = (
    "exaone4", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "ministral", "mistral",
    "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
_NEIGHBOURS_TURN = ("cohere", "cohere2", "ernie4_5", "glm", "glm4")
FAMILIES: dict[str, Callable[[Any, int], Block]] = {
    **dict.fromkeys(_PLAIN, _decoder),
    **dict.fromkeys(_NEIGHBOURS_TURN, partial(_decoder, interleaved=True)),
    **dict.fromkeys(("t5", "mt5"), _t5),
    **dict.fromkeys(("bart", "opt", "whisper"), _bart),
}
"""How the blocks of a model are described, by `config.model_type`: (split model, index of the block) -> block."""


# ---------------------------------------------------------------- the modules that the kernels stand for


def require_plain(split: Any) -> None:
    """Refuse models whose blocks do more than their modules' own code, which is all that the kernels know.

    Args:
        split: A `SplitModel`.

    Raises:
        NativeError: A hook or another `forward` would not be called, or the attention is somebody's own.
    """
    for module in _modules(split):
        if any(acting(module)):
            name = next(name for name, found in split.model.named_modules() if found is module)
            raise NativeError(f"{name} has a hook or a forward of its own, which the kernels would not call")
    if (attention := getattr(split.config, "_attn_implementation", None)) not in (None, "eager", "sdpa"):
        raise NativeError(f"its attention is {attention!r}; the kernels compute what sdpa and eager do")
    if attention == "sdpa" and getattr(split.config, "attn_logit_softcapping", None):
        raise NativeError("its attention is 'sdpa', which leaves out its scores' cap; load it with 'eager' attention")


def parts(split: Any) -> list[object]:
    """Everything that can be exchanged in what the kernels stand for, to be compared by identity."""
    return [
        part
        for module in _modules(split)
        for part in (module, *module._parameters.values(), *module._buffers.values(), *acting(module))
    ]


def _modules(split: Any) -> Iterator[nn.Module]:
    return (module for root in (*split.blocks[: split.num_layers], split.norm, split.head) for module in root.modules())
