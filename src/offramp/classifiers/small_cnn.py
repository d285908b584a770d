"""A convolutional network of a few small blocks, for images of a few pixels: students and teachers of stand-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from offramp.families.backbone import Activations, Backbone


@dataclass(frozen=True)
class SmallCNNConfig:
    """The shape of a network.

    Attributes:
        width: Channels w of the first block; each later block has twice as many.
        blocks: L, each a 3 x 3 convolution, batch norm and ReLU; all but the last halve height and width.
        image_size: Height and width of the images.
        in_channels: Channels of the images.
        places: Features are averages over this many places along each side, side by side: 1 forgets where things are.
    """

    width: int = 8
    blocks: int = 3
    image_size: int = 14
    in_channels: int = 3
    places: int = 2

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "image_size", "in_channels", "places"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it counts from 1")
        if self.image_size >> (self.blocks - 1) < self.places:
            raise ValueError(
                f"image_size is {self.image_size}; after {self.blocks - 1} halvings fewer than {self.places} places "
                "are left along a side; take fewer blocks or places"
            )


class PlacesBody(nn.Module):
    """Averages of maps [B, D, H, W] over places x places fields, as features [B, D * places²]."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, state: Activations) -> Tensor:
        """Features of activations."""
        return F.adaptive_avg_pool2d(state.hidden, self.places).flatten(1)


class SmallCNN(Backbone):
    """The network without its classifiers.

    Args:
        config: Its shape.
    """

    main_input = "pixel_values"

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.num_layers = config.blocks
        self.widths = [config.width << block for block in range(config.blocks)]
        self.blocks = nn.ModuleList()
        for block, (ins, outs) in enumerate(zip([config.in_channels, *self.widths], self.widths, strict=False)):
            convolution = nn.Conv2d(ins, outs, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            halved = [nn.MaxPool2d(2)] if block < config.blocks - 1 else []
            self.blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(outs), nn.ReLU(), *halved))

    def start(self, inputs: Mapping[str, Tensor]) -> Activations:
        """Images [B, in_channels, H, W] in the network's number format.

        Returns:
            The activations that enter the first block.

        Raises:
            ValueError: The images are of another shape.
        """
        images = inputs[self.main_input]
        size, channels = self.config.image_size, self.config.in_channels
        if images.shape[1:] != (channels, size, size):
            raise ValueError(f"images have shape {list(images.shape)}; rows x {channels} x {size} x {size} are needed")
        return Activations((images.to(device=self.device, dtype=self.dtype, non_blocking=True),))

    def run(self, state: Activations, lo: int, hi: int) -> Activations:
        """Take maps after `lo` blocks to those after `hi`."""
        hidden = state.hidden
        for index in range(lo, hi):
            hidden = self.blocks[index](hidden)
        return Activations((hidden,), hi)

    def body(self, layer: int, pooling: str | None) -> tuple[nn.Module, int]:
        """Averages over fields; `pooling` has no say in it."""
        return PlacesBody(self.config.places), self.widths[layer - 1] * self.config.places**2
