"""Convolutional networks of our own: a small one for images of a few pixels, and MSDNet, which is made for early exits.

The small one is what students and teachers of stand-ins are. Multi-scale dense networks are of Huang et al. 2018,
"Multi-Scale Dense Networks for Resource Efficient Image Classification" (arXiv 1703.09844). Every layer works at
several resolutions at once, so that a classifier finds coarse features at any depth, and every layer sees all earlier
ones of its scale, so that an early classifier does not disturb a later one. Reduction (section 4): the layers are cut
into as many parts as there are scales; each part drops the finest scale of the part before, and halves the channels at
the boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.families.backbone import Activations, Backbone

SIZES = ("small", "medium", "large")
"""Published sizes, see `MSDNetConfig.published`."""


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


@dataclass(frozen=True)
class MSDNetConfig:
    """The shape of a network. The defaults are those published for CIFAR.

    Attributes:
        blocks: How many blocks there are, each with a classifier behind it: L.
        base: Layers of the first block.
        step: Layers of each later one.
        growing: Whether block i (from 0) has step · i + 1 layers instead.
        channels: Channels of the first layer, at the finest scale.
        growth: Channels that a layer adds, at the finest scale.
        scales: By how much the channels of each scale are multiplied, finest first; one number per scale.
        bottlenecks: A layer's inner width at each scale, as a multiple of what it puts out there.
        reduction: Share of the channels that is kept where a scale is dropped.
        head_channels: Channels of the classifiers; None: as many as they receive.
        image_size: Height and width of the images; smaller ones are padded with the pixels at their edge.
        in_channels: 1 (grey) or 3 (colour).
        large_stem: Whether the network begins at a quarter of the resolution, for large images.
    """

    blocks: int = 4
    base: int = 1
    step: int = 1
    growing: bool = True
    channels: int = 16
    growth: int = 6
    scales: tuple[int, ...] = (1, 2, 4)
    bottlenecks: tuple[int, ...] = (1, 2, 4)
    reduction: float = 0.5
    head_channels: int | None = 128
    image_size: int = 32
    in_channels: int = 3
    large_stem: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))  # lists, if they come from JSON
        object.__setattr__(self, "bottlenecks", tuple(self.bottlenecks))
        for name in ("blocks", "base", "step", "channels", "growth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it counts from 1")
        if len(self.scales) != len(self.bottlenecks) or not self.scales:
            raise ValueError(f"scales are {self.scales} and bottlenecks {self.bottlenecks}; one number each per scale")
        if odd := [g for g in self.scales[1:] if self.growth * g % 2]:
            raise ValueError(f"growth {self.growth} times scale factor {odd[0]} is odd; half comes from each scale")
        if not 0 < self.reduction <= 1:
            raise ValueError(f"reduction is {self.reduction}; it is the share of channels kept, in (0, 1]")
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels is {self.in_channels}; allowed are 1 (grey) and 3 (colour)")
        if self.feature_side < 1:
            raise ValueError(f"image_size is {self.image_size}; its coarsest map is too small for a classifier")

    @property
    def steps(self) -> tuple[int, ...]:
        """Layers of each block."""
        later = (self.step * i + 1 if self.growing else self.step for i in range(1, self.blocks))
        return (self.base, *later)

    @property
    def feature_side(self) -> int:
        """Height and width that a classifier's maps end with; 1 in all published networks."""
        side = self.image_size
        for _ in range(len(self.scales) - 1 + 2 + (2 if self.large_stem else 0)):  # each a stride of 2
            side = -(-side // 2)
        return side // 2

    @classmethod
    def published(cls, size: str, image_size: int = 32, in_channels: int = 3) -> MSDNetConfig:
        """One of the configurations of Meronen et al. 2023 (arXiv 2302.06359), which follow the original paper's.

        Args:
            size: One of `SIZES`: 4, 6 or 8 blocks of 1, 2, 3, .. layers for small images; 5 blocks of 4, 6 or 7 layers
                for large ones.
            image_size: 32 (CIFAR; 28 x 28 images are padded) or 224 (ImageNet, Caltech-256).
            in_channels: 1 (grey) or 3 (colour).

        Returns:
            The configuration.

        Raises:
            ValueError: There is none of that size.
        """
        if size not in SIZES or image_size not in (32, 224):
            raise ValueError(
                f"there is no published MSDNet {size!r} for images of {image_size}; sizes are {', '.join(SIZES)}, "
                "for images of 32 or 224"
            )
        place = SIZES.index(size)
        if image_size == 32:
            return cls(blocks=(4, 6, 8)[place], in_channels=in_channels)
        layers = (4, 6, 7)[place]
        return cls(
            blocks=5, base=layers, step=layers, growing=False, channels=32, growth=16, scales=(1, 2, 4, 4),
            bottlenecks=(1, 2, 4, 4), head_channels=None, image_size=224, in_channels=in_channels, large_stem=True,
        )  # fmt: skip


def _conv(ins: int, outs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(ins, outs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outs), nn.ReLU(inplace=True))


def _bottleneck(ins: int, outs: int, factor: int, stride: int) -> nn.Sequential:
    """A 1 x 1 convolution to at most `factor * outs` channels, then a 3 x 3 one."""
    inner = min(ins, factor * outs)
    return nn.Sequential(_conv(ins, inner, kernel=1), _conv(inner, outs, stride=stride))


class Stem(nn.Module):
    """The first layer: each scale is made of the finer one. Images [B, in, H, W] -> one map per scale."""

    def __init__(self, config: MSDNetConfig) -> None:
        super().__init__()
        widths = [config.channels * g for g in config.scales]
        first = _conv(config.in_channels, widths[0])
        if config.large_stem:
            first = _conv(config.in_channels, widths[0], kernel=7, stride=2).append(nn.MaxPool2d(3, 2, padding=1))
        coarser = (_conv(a, b, stride=2) for a, b in zip(widths, widths[1:], strict=False))
        self.scales = nn.ModuleList([first, *coarser])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One map, the images, to one per scale."""
        made = []
        x = maps[0]
        for scale in self.scales:
            x = scale(x)
            made.append(x)
        return made


class Layer(nn.Module):
    """One dense layer at the scales still in: what came, then half of the new from the finer scale, half from its own.

    Args:
        config: Configuration of the network.
        channels: Channels that come in, at scale factor 1.
        finest: Index of the finest scale that goes out.
        drops: Whether the scale before that comes in for the last time.
    """

    def __init__(self, config: MSDNetConfig, channels: int, finest: int, *, drops: bool) -> None:
        super().__init__()
        self.drops = drops
        self.own, self.finer = nn.ModuleList(), nn.ModuleList()
        for s in range(finest, len(config.scales)):
            new = config.growth * config.scales[s]
            if drops or s > finest:
                new //= 2
                before = channels * config.scales[s - 1]
                self.finer.append(_bottleneck(before, new, config.bottlenecks[s - 1], stride=2))
            self.own.append(_bottleneck(channels * config.scales[s], new, config.bottlenecks[s], stride=1))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps of the scales that come in to maps of those that go out, with more channels."""
        kept = maps[1:] if self.drops else maps
        down = [finer(x) for finer, x in zip(self.finer, maps, strict=False)]
        missing = len(kept) - len(down)  # the finest scale of all has none finer
        made = []
        for i, (own, x) in enumerate(zip(self.own, kept, strict=True)):
            new = [] if i < missing else [down[i - missing]]
            made.append(torch.cat([x, *new, own(x)], dim=1))
        return made


class Transition(nn.Module):
    """A 1 x 1 convolution per scale, to fewer channels."""

    def __init__(self, factors: tuple[int, ...], ins: int, outs: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_conv(ins * g, outs * g, kernel=1) for g in factors)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One map per scale to one per scale."""
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class ConvBody(nn.Module):
    """A classifier's features: two strided convolutions of the coarsest map, and an average over 2 x 2 places."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.channels = ins, outs
        self.layers = nn.Sequential(_conv(ins, outs, stride=2), _conv(outs, outs, stride=2), nn.AvgPool2d(2))
        _initialise(self)

    def forward(self, state: Activations) -> Tensor:
        """Features [B, D] of activations."""
        features: Tensor = self.layers(state.hidden)  # [B, D, h, w]
        return features.flatten(1)


class MSDNet(Backbone):
    """The network without its classifiers.

    Args:
        config: Its shape.
    """

    main_input = "pixel_values"

    def __init__(self, config: MSDNetConfig) -> None:
        super().__init__()
        self.config = config
        self.num_layers = config.blocks
        self.blocks = nn.ModuleList()
        self.widths: list[int] = []  # channels of the coarsest map behind each block
        plan = list(self._layers())
        for size in config.steps:
            built, channels = zip(*plan[:size], strict=True)
            plan = plan[size:]
            self.blocks.append(nn.Sequential(*(module for modules in built for module in modules)))
            self.widths.append(channels[-1] * config.scales[-1])
        _initialise(self)

    def _layers(self) -> Iterator[tuple[list[nn.Module], int]]:
        """The modules of each dense layer, and its channels at scale factor 1 when they are through."""
        config, channels = self.config, self.config.channels
        total, scales = sum(config.steps), len(config.scales)
        part = -(-total // scales)  # layers between two scales dropped
        for i in range(total):
            modules: list[nn.Module] = [Stem(config)] if i == 0 else []
            finest, drops = i // part, i > 0 and i % part == 0
            modules.append(Layer(config, channels, finest, drops=drops))
            channels += config.growth
            if drops and config.reduction < 1:
                fewer = int(config.reduction * channels)
                modules.append(Transition(config.scales[finest:], channels, fewer))
                channels = fewer
            yield modules, channels

    def start(self, inputs: Mapping[str, Tensor]) -> Activations:
        """Images [B, in_channels, H, W] in the network's number format, padded at the edge to its size.

        Returns:
            The activations that enter the first block.

        Raises:
            ValueError: The images are of another kind or larger.
        """
        images = inputs[self.main_input]
        size, channels = self.config.image_size, self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels or max(images.shape[2:]) > size:
            raise ValueError(
                f"images have shape {list(images.shape)}; rows x {channels} x H x W are needed, H and W up to {size}"
            )
        images = images.to(device=self.device, dtype=self.dtype, non_blocking=True)
        high, wide = (size - side for side in images.shape[2:])
        if high or wide:
            edges = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
            images = F.pad(images, edges, mode="replicate")
        return Activations((images,))

    def run(self, state: Activations, lo: int, hi: int) -> Activations:
        """Take maps after `lo` blocks to those after `hi`."""
        maps = list(state.maps)
        for index in range(lo, hi):
            maps = self.blocks[index](maps)
        return Activations(tuple(maps), hi)

    def body(self, layer: int, pooling: str | None) -> tuple[nn.Module, int]:
        """The paper's classifier behind block `layer` without its linear layer; `pooling` has no say in it."""
        ins, config = self.widths[layer - 1], self.config
        outs = config.head_channels or ins
        return ConvBody(ins, outs), outs * config.feature_side**2


def _initialise(module: nn.Module) -> None:
    """Convolutions as for ReLU (He et al. 2015, fan out); batch norms begin as nothing, as torch makes them."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
