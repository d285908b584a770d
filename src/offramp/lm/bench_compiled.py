"""`transformers` as its documentation makes it fast: a static cache, and `torch.compile` of the step of one token."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import CompileConfig, EncoderDecoderCache, StaticCache

from offramp.core.language_model import LanguageModel

BACKEND = "inductor"


class Compiled:
    """A model's own `generate`, compiled for each batch size; nothing stays on the model.

    Caches are kept, one for each batch size (and length of an encoder's input), as addresses that change would have
    CUDA graphs recorded anew. The prompt's pass is not compiled, as in `transformers`.

    Args:
        lm: The model; its weights are shared.
        length: Most tokens of a prompt and its continuation.
    """

    def __init__(self, lm: LanguageModel, length: int) -> None:
        self._model: Any = copy.copy(lm.model)
        self._cache_name, self._length, self._decoder = lm.split.cache_name, length, lm.split.config
        self._caches: dict[tuple[int, ...], Any] = {}
        self._config = CompileConfig(dynamic=False, backend=BACKEND)
        self._config._compile_all_devices = True  # also on a CPU, where it would be left out in silence

    def generate(self, *, input_ids: Tensor, **options: Any) -> Tensor:
        """As the model's own `generate`."""
        shape = tuple(input_ids.shape) if self._model.config.is_encoder_decoder else (len(input_ids),)
        if shape not in self._caches:
            self._caches[shape] = self._new_cache(*shape)
        cache = self._caches[shape]
        cache.reset()
        made: Tensor = self._model.generate(
            input_ids=input_ids, compile_config=self._config, **{self._cache_name: cache}, **options
        )
        return made

    def _new_cache(self, batch: int, heard: int | None = None) -> Any:
        own = StaticCache(config=self._decoder, max_cache_len=self._length)
        if heard is None:
            return own
        return EncoderDecoderCache(own, StaticCache(config=self._decoder, max_cache_len=heard))
