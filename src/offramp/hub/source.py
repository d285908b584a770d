"""A model's source, and what sources there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp.hub.catalogue import PACKAGED
from offramp.values import nearest


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
