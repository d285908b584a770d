"""Exits that were trained for a model: a tuned lens after some of its layers, before the shared final norm and head.

A lens is affine, h + W h + b on the residual state [..., D] (Belrose et al. 2023, arXiv 2303.08112), and begins as
nothing: W = 0 and b = 0. Before it an exit may have a branch: transformer blocks of its own, with keys and values of
their own (Kangaroo's adapter, Liu et al. 2024, arXiv 2404.18911, is one block), begun as copies of the model's last
ones that add nothing to the state yet. The model itself is untouched, so its full output stays what it is, bit for bit.
Beside lens and branch there may be a consistency classifier, which says from the readout input alone whether to leave
there, and for all exits a posterior that was fitted on text (`offramp.hub.exit_posterior`), a list of frequent tokens,
the only ones that `ExitPolicy(vocabulary="frequent")` scores, and a drafter (`offramp.core.adapters`). Weights are kept
in float32 (in files, branches and drafter in bfloat16), with the name and the fingerprint of those they were made for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.core.adapters import Branch, Drafter, Lens
from offramp.core.policy import DRAFTER
from offramp.families.network import first_weights
from offramp.runs.digests import fingerprint

if TYPE_CHECKING:
    from offramp.core.confidence import Confidence, Reading
    from offramp.core.plan import Plan
    from offramp.families import SplitModel


# ---------------------------------------------------------------- which layers, which model


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Layers that get an exit unless they are named: from a third of the depth on, evenly, at most eight.

    Early ones are worth having: a lens agrees with the last layer almost as often at a third of the depth as at half of
    it (SmolLM2-135M: .58 after layer 10 of 30, .60 after 15, .68 after 22). More of them would test more than they
    save, since each test of all tokens costs a readout (8 blocks there). L - 1 is not forced in for the same reason: to
    leave there saves one block.

    Args:
        num_layers: L.

    Returns:
        Ascending layers in 1..L-1; none for a single layer. 10, 13, .. 28 of 30; 8, 10, .. 22 of 24; 4, 5, .. 11 of 12.
    """
    first = max(1, num_layers // 3)
    return tuple(range(first, num_layers, max(1, -(-(num_layers - first) // 8))))


def listed_once(tokens: Sequence[int] | Tensor) -> Tensor:
    """Token ids as a list, int64 [K], ascending and each of them once.

    Returns:
        The list.

    Raises:
        ValueError: They are no token ids, or fewer than two.
    """
    ids = torch.as_tensor(tokens)
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"frequent tokens are {ids.dtype} of shape {list(ids.shape)}; give a list of token ids")
    ids = torch.tensor(sorted(set(ids.tolist())), dtype=torch.long)
    if len(ids) < 2 or int(ids[0]) < 0:
        raise ValueError(f"frequent tokens are {ids[:4].tolist()}; give at least two token ids, from 0 on")
    return ids


# ---------------------------------------------------------------- exits


class Exits(nn.Module):
    """The trained exits of one model; made by `fresh`, then trained, or by `load`.

    Args:
        num_layers: L of the model.
        width: D of the model.
        layers: The exit layers, ascending in 1..L-1; there may be none where there is a drafter.
        rank: Rank of the lenses; None: full matrices; 0: no lenses, such as for a model that was itself trained to be
            read out after these layers.
        blocks: How many transformer blocks of its own each exit has; their weights come from `fresh` or from a file.
        classifier: Whether there is a consistency classifier after each of the layers.
        drafter: How many transformer blocks the drafter has; 0: there is none. It comes from `with_drafter` or a file.
        model: Name of the model they are for.
        fingerprint: Of its weights.
        settings: How they were trained, as JSON values.
        device: Where they are.

    Raises:
        ValueError: The layers or the rank do not fit the model.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        layers: Sequence[int],
        rank: int | None = None,
        *,
        blocks: int = 0,
        classifier: bool = False,
        drafter: int = 0,
        model: str = "",
        fingerprint: str = "",
        settings: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        if not (self.layers or drafter) or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"the exit layers are {self.layers}; give ascending layers, each once, and at least one")
        if self.layers and not 1 <= self.layers[0] <= self.layers[-1] < num_layers:
            raise ValueError(
                f"the exit layers are {self.layers}; a model of {num_layers} layers can have exits after layers "
                f"1..{num_layers - 1} (layer {num_layers} is always an exit, leave it out)"
            )
        for name, count in (("blocks", blocks), ("drafter", drafter)):
            if not 0 <= count <= num_layers:
                raise ValueError(f"{name} is {count}; it can have 0..{num_layers} blocks of its own")
        if rank is not None and not 0 <= rank <= width:
            raise ValueError(
                f"rank is {rank}; allowed are 1..{width}, the model's width, 0 for exits without lenses, or None for "
                "full matrices"
            )
        self.num_layers, self.width, self.rank, self.blocks = num_layers, width, rank, blocks
        self.model, self.fingerprint, self.settings = model, fingerprint, dict(settings or {})
        lensed = () if rank == 0 else self.layers
        self.lenses = nn.ModuleDict({str(layer): Lens(width, rank, device=device) for layer in lensed})
        self.branches = nn.ModuleDict()  # one `Branch` per layer, if `blocks`
        self.drafter: Drafter | None = None
        self.classifiers: nn.ModuleDict | None = self._untrained(device) if classifier else None
        self.posterior: Any = None  # an `offramp.hub.exit_posterior.Posterior`, if one was fitted
        self.frequent: Tensor | None
        self.register_buffer("frequent", None)  # so that it moves with them and their fingerprint covers it

    def _untrained(self, device: torch.device | None) -> nn.ModuleDict:
        """A classifier per exit whose logit is 0 for every state."""
        made = nn.ModuleDict({str(layer): nn.Linear(self.width, 1, device=device) for layer in self.layers})
        for parameter in made.parameters():
            nn.init.zeros_(parameter)
        return made

    @classmethod
    def fresh(
        cls, split: SplitModel, layers: Sequence[int] | None = None, rank: int | None = None, blocks: int = 0
    ) -> Exits:
        """Exits that change nothing yet.

        The first factor of low-rank lenses is drawn at random: seed torch for the same ones.

        Args:
            split: The model they are for.
            layers: The exit layers; None: `default_layers`.
            rank: Rank of the lenses; None: full matrices; 0: no lenses.
            blocks: Blocks of its own that each exit has, before its lens. (Where norms stand behind the sublayers, as
                in BART and OLMo 2, they change the state at first.)

        Returns:
            Exits in float32 on the model's device.

        Raises:
            ValueError: The layers or the rank do not fit the model.
        """
        layers = default_layers(split.num_layers) if layers is None else layers
        made = cls(split.num_layers, split.shape.width, layers, rank, blocks=blocks, device=split.device)
        for layer in made.layers if blocks else ():
            made.branches[str(layer)] = Branch(first_weights(split, blocks))
        made.model, made.fingerprint = type(split.model).__name__, fingerprint(split.model)
        return made

    def with_drafter(self, split: SplitModel, blocks: int) -> Exits:
        """A copy with an untrained drafter of so many blocks (at least 1); it replaces any there is."""
        made = copy.deepcopy(self)
        made.drafter = Drafter(self.width, Branch(first_weights(split, blocks)), device=split.device)
        return made

    @property
    def adapters(self) -> nn.ModuleDict:
        """What stands between the model's states and the readouts: lenses and, if there are any, branches."""
        return nn.ModuleDict({"lenses": self.lenses, "branches": self.branches}) if self.branches else self.lenses

    def adapt(self, layer: int, hidden: Tensor) -> Tensor:
        """States [..., D] after `layer`, through its lens; unchanged where there is none."""
        lens = self.lens(layer)
        adapted: Tensor = hidden if lens is None else lens(hidden)
        return adapted

    def lens(self, layer: int) -> Lens | None:
        """The lens after `layer` (the drafter's: 0), if there is one."""
        if layer == DRAFTER:
            return None if self.drafter is None else self.drafter.lens
        return self.lenses[str(layer)] if str(layer) in self.lenses else None  # type: ignore[return-value]

    def with_classifiers(self, device: torch.device | None = None) -> Exits:
        """A copy with untrained classifiers, by which every state has the confidence 1/2; it replaces any there are.

        Args:
            device: Theirs; None: that of the exits' parameters, the CPU where they have none.

        Returns:
            The copy.
        """
        made = copy.deepcopy(self)
        made.classifiers = made._untrained(device or next((p.device for p in self.parameters()), None))
        return made

    def only(self, layers: Sequence[int]) -> Exits:
        """A copy with some of the exits, without a posterior."""
        made = self.with_posterior(None)
        made.layers = tuple(layers)
        for parts in filter(None, (made.lenses, made.branches, made.classifiers)):
            for name in set(parts) - {str(layer) for layer in layers}:
                del parts[name]
        return made

    def with_posterior(self, posterior: nn.Module | None) -> Exits:
        """A copy with a posterior that was fitted for these exits, or with none."""
        made = copy.deepcopy(self)
        made.posterior = posterior
        return made

    def with_frequent(self, tokens: Sequence[int] | Tensor | None) -> Exits:
        """A copy with a list of frequent tokens, see `offramp.training.frequent.frequent_tokens`, or with none.

        Args:
            tokens: Token ids, in any order, such as the ends of a sequence among them: one that is not listed can only
                be chosen by the last layer. None: no list.

        Returns:
            The copy, the list ascending.

        Raises:
            ValueError: They are no token ids, or fewer than two.
        """
        made = copy.deepcopy(self)
        made.frequent = (
            None if tokens is None else listed_once(tokens).to(next(self.parameters(), torch.empty(0)).device)
        )
        return made

    def classify(self, layer: int, x: Tensor) -> Tensor:
        """Logit that what is chosen after `layer` is what the last layer would choose: w_l · x + b_l, in float32.

        The classifier of CALM (Schuster et al. 2022, arXiv 2207.07061, section 3.3) and FREE (arXiv 2310.05424). Theirs
        have two classes; the softmax of two logits is the logistic function of their difference, so that one logit is
        the same model.

        Args:
            layer: An exit layer; the classifiers must be there (see `with_classifiers_after`).
            x: Readout inputs after it, [..., D], as `SplitModel.readout_input` gives them.

        Returns:
            Logits, [...]; their logistic function is the confidence.
        """
        assert self.classifiers is not None
        linear: Any = self.classifiers[str(layer)]
        return F.linear(x.float(), linear.weight.float(), linear.bias.float())[..., 0]

    def weights(self, layer: int) -> int:
        """Weights that one state after `layer` is multiplied with; 0 without a lens."""
        lens = self.lens(layer)
        return 0 if lens is None else lens.weights

    def flops(self, layer: int) -> int:
        """FLOPs that the lens after `layer` adds to reading one state; 0 without a lens."""
        return 2 * self.weights(layer)

    def placed(self, dtype: torch.dtype, device: torch.device) -> Exits:
        """These exits in a model's number format and place: themselves if they are, else a copy not for training."""
        there = all(b.device == device for b in self.buffers())
        if there and all(p.dtype == dtype and p.device == device for p in self.parameters()):
            return self
        made = self.with_posterior(None).to(dtype=dtype, device=device).requires_grad_(False)
        if self.posterior is not None:  # stays in float32
            made.posterior = copy.deepcopy(self.posterior).to(device)
        return made

    # ------------------------------------------------------------ confidences

    def confidence(self, name: str, plan: Plan) -> Confidence:
        """The measure "classifier", or one of the posterior's.

        Returns:
            The measure.

        Raises:
            ValueError: There are no classifiers or no posterior, or none for what the plan asks for.
        """
        if name == "classifier":
            return Consistency(self.with_classifiers_after(plan.thresholds))
        if self.posterior is None:
            raise ValueError(
                f"confidence {name!r} needs a posterior fitted on text, but the model's exits have none; fit one with: "
                f"offramp calibrate MODEL --posterior {name}"
            )
        found: Confidence = self.posterior.confidence(name, plan)
        return found

    def with_classifiers_after(self, layers: Iterable[int]) -> Exits:
        """See that there are classifiers after some layers.

        Returns:
            These exits themselves.

        Raises:
            ValueError: They have none, or none after one of the layers.
        """
        if self.classifiers is None:
            raise ValueError(
                "confidence 'classifier' needs trained classifiers, but the model's exits have no classifiers; train "
                "some with: offramp train --objective consistency"
            )
        if lacking := [layer for layer in layers if layer not in self.layers]:
            raise ValueError(
                f"confidence 'classifier' is asked for after layer {lacking[0]}, but the exits have classifiers after "
                f"layers {', '.join(map(str, self.layers))} only; name some of these as exit_layers, or leave "
                "min_layer and exit_layers away"
            )
        return self


@dataclass(frozen=True)
class Consistency:
    """How probably the last layer would choose the same token (CALM's classifier, section 3.3; FREE), in [0, 1].

    σ(w_l · x + b_l) of the readout input x, for which w_l and b_l were trained (see `Exits.classify`). If they were
    trained on balanced classes, it is the probability if both outcomes were equally frequent. Needs no head.
    """

    exits: Exits

    def __call__(self, reading: Reading) -> Tensor:
        """One probability per row, [A]; NaN for logits that are not finite."""
        logits = self.exits.classify(reading.layer, reading.input)
        reading.bill(2 * self.exits.width, self.exits.width * reading.input.element_size())
        return torch.where(logits.isfinite(), logits.sigmoid(), torch.nan)
