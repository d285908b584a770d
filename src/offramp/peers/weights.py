"""A model's weights in the files that peers load: GGUF for llama.cpp, a folder as transformers saves it for others.

They are kept in the cache under a digest of weights and settings, appear there complete or not at all, and are used
again. They take as much room as the weights: delete `peers/weights` in the cache to have it back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offramp.hub.messages import first_line, quiet
from offramp.hub.model_sources import cache_folder
from offramp.peers.process import PeerError
from offramp.runs.digests import fingerprint
from offramp.runs.files import replace_file, replace_folder

FORMATS = ("f16", "q8_0", "q4_1")
"""Formats of GGUF files, as llama.cpp calls them. Norms are in float32 in all of them, embeddings and head at least in
q8_0, as in the files that llama.cpp makes of models of SmolLM2's width."""
_WRITER = 1  # the version of what is written here
_INDIFFERENT = ("_name_or_path", "architectures", "dtype", "transformers_version")  # saving a model sets them


def gguf_file(model: PreTrainedModel, format: str) -> Path:
    """The weights as a GGUF file without a vocabulary: prompts are token ids.

    Args:
        model: A Llama.
        format: One of `FORMATS`.

    Returns:
        The file.

    Raises:
        PeerError: The model is of another family, or has something that is not written here; or there is no room.
    """
    require_llama(model)
    path = _place(model, f"{format}.gguf")
    if not path.is_file():
        _made(path, lambda: replace_file(path, lambda into: write_gguf(model, format, into)))
    return path


def model_folder(model: PreTrainedModel) -> Path:
    """The weights as `transformers` saves them, in the number format they are in.

    Returns:
        The folder.

    Raises:
        PeerError: There is no room.
    """
    path = _place(model, str(model.dtype).removeprefix("torch."))
    if not path.is_dir():
        with quiet():
            _made(path, lambda: replace_folder(path, lambda into: model.save_pretrained(into)))
    return path


def _place(model: PreTrainedModel, what: str) -> Path:
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _INDIFFERENT}
    digest = hashlib.sha256(json.dumps([_WRITER, fingerprint(model), settings], sort_keys=True, default=str).encode())
    return cache_folder() / "peers" / "weights" / f"{digest.hexdigest()[:16]}-{what}"


def _made(path: Path, make: Callable[[], None]) -> None:
    try:
        make()
    except OSError as error:
        raise PeerError(f"{path} cannot be written: {first_line(error)}") from error


# ---------------------------------------------------------------- GGUF


def require_llama(model: PreTrainedModel) -> None:
    """Raise a PeerError unless `write_gguf` can write a model."""
    config: Any = model.config
    if config.model_type != "llama":
        raise PeerError(f"its files are written for Llama only, and the model is of the family {config.model_type}")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "llama3") or config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        raise PeerError(f"its files are not written for rotary frequencies of the kind {kind}")
    names = _gguf_names(config.num_hidden_layers)
    unknown = [name for name in _weights(model) if names.get_name(name, (".weight",)) is None]
    if unknown:
        raise PeerError(f"its files are not written for models with {unknown[0]}; merge adapters, leave biases out")


def write_gguf(model: PreTrainedModel, format: str, path: Path) -> None:
    """Write a Llama's weights as GGUF.

    llama.cpp rotates neighbours, where transformers rotates halves: the rows of queries and keys are reordered.

    Args:
        model: The model.
        format: One of `FORMATS`.
        path: The file.
    """
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    names = _gguf_names(config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in _weights(model).items():
        kind = _kind(name, weight, format)
        values = weight.detach().float().cpu()
        if count := heads.get(name.split(".")[-2]):
            values = neighbours(values, count)
        packed = gguf.quants.quantize(values.numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=kind)
    if (factors := _slower(model, width)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows [H · d, D] of which a head's first and second half are rotated together, ordered for neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])  # [H, 2, d / 2, D]
    return halves.transpose(1, 2).reshape(weight.shape)


def _gguf_names(layers: int) -> Any:
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights by name; of a head that is the embeddings, these alone."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def _kind(name: str, weight: Tensor, format: str) -> Any:
    from gguf import GGMLQuantizationType as Kind

    if weight.ndim == 1:
        return Kind.F32
    ends = name in ("model.embed_tokens.weight", "lm_head.weight")
    return Kind["Q8_0" if ends and format == "q4_1" else format.upper()]


def _slower(model: PreTrainedModel, width: int) -> Tensor | None:
    """By what rotary frequencies are divided, float32 [d / 2]; None: they are the plain ones."""
    config: Any = model.config
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    own = model.model.rotary_emb.inv_freq.double().cpu()
    return None if torch.allclose(own, plain, rtol=1e-3) else (plain / own).float()
