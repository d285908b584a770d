"""Calibrated probabilities of every exit: temperature, last-layer Laplace, model-internal ensemble, and combinations.

Meronen et al. (2023), "Fixing Overconfidence in Dynamic Neural Networks" (arXiv 2302.06359). Differs in exact
expectations over all rows in the factors, draws that are made once, and a continuous temperature. Exits are counted
from 0 in arguments and from 1 in words.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from offramp.runs import artefact, digests
from offramp.runs.tables import markdown
from offramp.uncertainty import predictive
from offramp.uncertainty.one_exit import METHODS as METHODS
from offramp.uncertainty.one_exit import ExitPosterior, Settings, fit_exits
from offramp.uncertainty.outputs import ExitOutputs, missing_classes, require_disjoint, require_fit

SCHEMA = "offramp/posterior/1"

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class PosteriorConfig(Settings):
    """What is fitted, and how: see `Settings` for the fields."""

    def fit(self, fit: ExitOutputs, tune: ExitOutputs, *, network: str = "", shared: bool = False) -> Posterior:
        """Factors from one split, temperatures and prior variances from another.

        Warns where classes have no rows, where a setting sits on the end of its grid, and where a factor was singular.

        Args:
            fit: Rows for the Kronecker factors, which only "laplace" reads: best ones that the network was not trained
                on, else training rows without augmentation.
            tune: Rows for temperature and prior variance.
            network: Fingerprint of the network and its exits, kept to refuse a mix-up later.
            shared: Whether the two splits may share rows, or be the same.

        Returns:
            The fitted posterior.

        Raises:
            ValueError: Splits that share rows or do not fit each other, no rows, a single class, numbers that are not
                finite, or draws that do not fit into `memory`.
        """
        _check_splits(self, fit, tune, shared)
        read = fit if self.is_laplace else tune
        draws = None
        if self.is_laplace and self.predictive == "mc":
            draws = predictive.draws(self.n_mc, tune.classes, self.seed)
        exits = fit_exits(self, fit, tune, draws)
        missing = missing_classes("fit" if self.is_laplace else "tune", read)
        messages = ([missing] if missing else []) + [
            f"exit {e + 1}: {message}" for e, exit in enumerate(exits) for message in exit.messages()
        ]
        for message in messages:
            warnings.warn(message, stacklevel=2)
        inputs = {"network": network, "tune": tune.fingerprint}
        if self.is_laplace:
            inputs["fit"] = fit.fingerprint
        widths = tuple(f.shape[1] for f in tune.features)
        return Posterior(self, tuple(exits), widths, tune.classes, tune.costs.double(), draws, inputs, tuple(messages))


# ---------------------------------------------------------------- state


@dataclass(frozen=True)
class Posterior:
    """Fitted: what turns features and logits of exits into probabilities.

    Attributes:
        config: What was fitted.
        exits: The exits, shallow to deep.
        widths: D of each.
        classes: C.
        costs: Cumulative, of each exit, [E]; the ensemble's weights come from them.
        draws: Standard normal, [n_mc, C], shared by all rows and exits; None: the method needs none.
        inputs: Fingerprints of "network", "tune" and "fit", what it was fitted on.
        messages: Warnings of the fit.
    """

    config: PosteriorConfig
    exits: tuple[ExitPosterior, ...]
    widths: tuple[int, ...]
    classes: int
    costs: Tensor
    draws: Tensor | None
    inputs: Mapping[str, str]
    messages: tuple[str, ...] = ()

    # ------------------------------------------------------------ apply

    def at(
        self, exit: int, features: Tensor, logits: Tensor, carried: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Probabilities at one exit, for leaving exit by exit. Worked out on the CPU in float64.

        Args:
            exit: Counted from 0.
            features: Inputs of the exit's last layer, [B, D].
            logits: [B, C].
            carried: What the exit before returned, of the rows that are left; None at the first exit.

        Returns:
            Probabilities, [B, C], float64, and what the next exit needs, [B, C], of which rows may be dropped; None
            unless the method is an ensemble. Both on the device of `logits`.

        Raises:
            ValueError: There is no such exit, shapes do not fit, or an ensemble misses what it carried.
        """
        if not 0 <= exit < len(self.exits):
            raise ValueError(f"exit is {exit}; there are exits 0..{len(self.exits) - 1}")
        shapes = list(features.shape), list(logits.shape)
        if shapes != ([len(logits), self.widths[exit]], [len(logits), self.classes]):
            raise ValueError(
                f"features and logits have shapes {shapes[0]} and {shapes[1]}; exit {exit} of this posterior takes "
                f"rows x {self.widths[exit]} and rows x {self.classes}"
            )
        fitted = self.exits[exit]
        p = fitted.predict(self.config, features.cpu(), logits.cpu()).probabilities(fitted.temperature)
        if not self.config.is_ensemble:
            return p.to(logits.device), None
        if (carried is None) != (exit == 0) or (carried is not None and carried.shape != logits.shape):
            have = "nothing" if carried is None else f"shape {list(carried.shape)}"
            need = "nothing" if exit == 0 else f"what exit {exit - 1} returned, shape {list(logits.shape)}"
            raise ValueError(f"carried to exit {exit} of an ensemble is {have}; it takes {need}")
        before = None if carried is None else carried.cpu()
        p, carried = predictive.ensemble_join(p, before, predictive.ensemble_weights(self.costs), exit)
        return p.to(logits.device), carried.to(logits.device)

    def batches(self, outputs: ExitOutputs) -> Iterator[tuple[slice, Tensor]]:
        """Rows, some at a time, with their probabilities, [E, B, C], float64; a ValueError for another network's."""
        if (outputs.exits, outputs.classes) != (len(self.exits), self.classes):
            raise ValueError(
                f"these rows have {outputs.exits} exits and {outputs.classes} classes; the posterior was fitted with "
                f"{len(self.exits)} and {self.classes}"
            )
        row = 8 * (predictive.ARRAYS * (max(self.widths) + self.classes) + (outputs.exits + 2) * self.classes)
        size = max(1, self.config.memory // row)
        for start in range(0, outputs.rows, size):
            part = slice(start, min(start + size, outputs.rows))
            found, carried = [], None
            for exit, (features, logits) in enumerate(zip(outputs.features, outputs.logits, strict=True)):
                p, carried = self.at(exit, features[part], logits[part], carried)
                found.append(p)
            yield part, torch.stack(found)

    def probabilities(self, outputs: ExitOutputs) -> Tensor:
        """Probabilities of all rows at all exits, [E, N, C], float64: what `at` gives, exit by exit."""
        result = torch.empty(outputs.logits.shape, dtype=torch.float64)
        for rows, p in self.batches(outputs):
            result[:, rows] = p
        return result

    # ------------------------------------------------------------ cost

    def overhead(self, exit: int) -> predictive.Overhead:
        """FLOPs of one row from logits to probabilities at an exit, counted from 0."""
        config, classes, width = self.config, self.classes, self.widths[exit]
        formula = 0
        if not config.is_laplace:
            counted = predictive.softmax_flops(classes) + (classes if "temperature" in config.method else 0)
        else:
            counted = predictive.spread_flops(width + config.bias, classes, config.damping)
            if config.predictive == "mc":
                formula = predictive.published_flops(width, classes, config.n_mc)
                counted += predictive.sampled_flops(classes, config.n_mc, config.damping)
            else:
                counted += predictive.probit_flops(classes, config.damping)
        if config.is_ensemble:
            counted += predictive.ensemble_flops(classes, exit)
        return predictive.Overhead(formula, counted)

    # ------------------------------------------------------------ in words, and on disk

    def table(self) -> str:
        """Settings and NLPD on the tune split by exit, * at an edge; under it what else to know. Markdown."""
        rows = []
        for e, exit in enumerate(self.exits):
            number = f"{e + 1}*" if exit.tuned.edges else str(e + 1)
            omega = "" if exit.omega is None else f"{exit.omega:.3g}"
            against = exit.comparison
            gain = "" if against is None else f"{against.gain:.4f} ± {against.error:.4f}"
            figures = [f"{against.vanilla:.4f}", f"{against.temperature:.4f}"] if against else ["", ""]
            rows.append([number, f"{exit.temperature:.3g}", omega, *figures, f"{exit.tuned.nlpd:.4f}", gain])
        head = ["exit", "T", "ω", "NLPD, T = 1", "NLPD, T only", "NLPD", "gain over T only"]
        verdicts = [
            f"exit {e + 1}: {exit.comparison.words()}" for e, exit in enumerate(self.exits) if exit.comparison
        ]  # fmt: skip
        return "\n\n".join([markdown(head, rows), *(f"* {m}" for m in self.messages), *verdicts])

    @cached_property
    def fingerprint(self) -> str:
        """Of the fitted state: what is found with it, such as thresholds, holds for it alone."""
        tensors = self._tensors()
        return digests.of(self._values(), [tensors[name] for name in sorted(tensors)])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write state.json and state.safetensors into a new folder, or one with an earlier state, which is replaced."""
        artefact.write(folder, SCHEMA, self._values(), self._tensors())

    def _values(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "exits": [exit.to_dict() for exit in self.exits],
            "widths": list(self.widths),
            "classes": self.classes,
            "inputs": dict(self.inputs),
            "messages": list(self.messages),
        }

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"{e}.{name}": tensor for e, exit in enumerate(self.exits) for name, tensor in exit.tensors().items()}
        return named | {"costs": self.costs} | ({} if self.draws is None else {"draws": self.draws})


def load_posterior(folder: str | os.PathLike[str], inputs: Mapping[str, str] | None = None) -> Posterior:
    """What `Posterior.save` wrote.

    Args:
        folder: The folder.
        inputs: Fingerprints of what it must have been fitted on, by name: "network", "tune", "fit", or some of them.

    Returns:
        The posterior.

    Raises:
        ValueError: There is none, its files were changed, or it was fitted on something else.
    """
    values, tensors = artefact.read(folder, SCHEMA)
    try:
        artefact.require_inputs(f"the posterior in {folder}", values["inputs"], inputs or {})
        exits = []
        for e, exit in enumerate(values["exits"]):
            own = {name.removeprefix(f"{e}."): tensor for name, tensor in tensors.items() if name.startswith(f"{e}.")}
            exits.append(ExitPosterior.from_dict(exit, own))
        return Posterior(
            PosteriorConfig(**values["config"]), tuple(exits), tuple(values["widths"]), values["classes"],
            tensors["costs"], tensors.get("draws"), values["inputs"], tuple(values["messages"]),
        )  # fmt: skip
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the posterior in {folder} is damaged ({error!r}); {artefact.STATE.again}") from error


def _check_splits(config: PosteriorConfig, fit: ExitOutputs, tune: ExitOutputs, shared: bool) -> None:
    if not shared:
        if fit is tune:
            raise ValueError("fit and tune are the same rows; give two splits, or say shared=True")
        require_disjoint(fit=fit, tune=tune)
    require_fit("tune", tune)
    if config.is_laplace and fit is not tune:
        require_fit("fit", fit)
        shapes = [(o.exits, o.classes, [f.shape[1] for f in o.features]) for o in (fit, tune)]
        if shapes[0] != shapes[1]:  # costs may differ: texts of two splits are not equally long
            raise ValueError(
                f"fit and tune are not of the same network: exits, classes and widths are {shapes[0]} and {shapes[1]}"
            )
    if config.is_laplace and config.predictive == "mc":
        each = 8 * tune.classes * (tune.exits + 1)  # the draws and, per exit, their directions
        if config.n_mc * each > config.memory:
            raise ValueError(
                f"n_mc is {config.n_mc}; at {tune.exits} exits with {tune.classes} classes {config.memory // each} "
                f"draws fit into memory, {config.memory} bytes; take fewer, or allow {config.n_mc * each}"
            )
