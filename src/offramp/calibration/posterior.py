"""Fit what the confidences "laplace", "conformal" and "avcs" need, on the tokens of real texts, and judge it.

config.json           what was asked; posterior.json, table.md: what was found
features/             readout inputs, see `token_cache`; a repeated call takes them from there
exits/                the exits with the posterior: offramp.load(model, exits=...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.calibration.posterior_report import PosteriorReport, judge
from offramp.calibration.token_rows import TokenViews, cache_tokens, factors_of, views_of
from offramp.core.exits import Exits
from offramp.core.plan import resolve
from offramp.core.policy import ExitPolicy
from offramp.core.sampling import ends_of
from offramp.hub.exit_files import save_exits
from offramp.hub.exit_posterior import METHODS, Posterior
from offramp.runs.digests import fingerprint
from offramp.runs.files import write_json
from offramp.runs.machine import describe
from offramp.runs.resume import locked
from offramp.uncertainty.candidates import LaplaceConfig, TokenLaplace, standard_draws
from offramp.uncertainty.token_sets import ConformalSets, EvidenceSets, conformal, evidence_sets
from offramp.uncertainty.tuning import TokensTuned, tune_tokens
from offramp.values import check_level

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.training.data import Document

Progress = Callable[..., None]
"""(done, total[, what is next])."""


@dataclass(frozen=True)
class PosteriorConfig:
    """What is fitted.

    Attributes:
        methods: Some of "laplace", "conformal", "avcs".
        candidates: k, the tokens that are uncertain, or in a set, at most.
        alpha: Share of tokens whose true one may be missing in the sets.
        laplace: Of the Laplace posterior.
        vocabulary: Pruning it is for: None, "fixed" or "decaying".
        vocabulary_size: Of that.
        to_text: Tune and calibrate for the text's tokens, not for the full model's.
        layers: Exits it is for, the only ones that are saved with it; None: all of the model's.
        seed: Of the splits, and of the draws of "avcs".

    Raises:
        ValueError: A value out of range.
    """

    methods: tuple[str, ...] = METHODS
    candidates: int = 64
    alpha: float = 0.1
    laplace: LaplaceConfig = field(default_factory=LaplaceConfig)
    vocabulary: str | None = None
    vocabulary_size: int | None = None
    to_text: bool = False
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods or not set(self.methods) <= set(METHODS):
            raise ValueError(f"posterior is {', '.join(self.methods) or 'empty'}; choose from {', '.join(METHODS)}")
        if self.candidates < 2:
            raise ValueError(f"candidates is {self.candidates}; at least 2 tokens must compete")
        check_level("alpha", self.alpha)
        if self.vocabulary not in (None, "fixed", "decaying"):
            raise ValueError(
                f"vocabulary is {self.vocabulary!r}; a posterior is fitted for None, 'fixed' or 'decaying' (adaptive "
                "sizes would depend on the confidence that is being fitted)"
            )


def fit_posterior(
    lm: LanguageModel,
    documents: Sequence[Document],
    folder: Path,
    config: PosteriorConfig | None = None,
    *,
    window: int = 256,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PosteriorReport:
    """Fit on texts, save the exits with the posterior to `folder / "exits"`, and judge it on held-out texts.

    Args:
        lm: The model with its exits (of rank 0 if nothing was trained); left as it is.
        documents: Texts, or questions with answers, whose tokens are predicted (`offramp.training.data`).
        folder: Run folder; cached readout inputs in it are used again.
        config: What to fit.
        window: Longest piece of a document, in tokens.
        about: What else the record should say, as JSON values.
        progress: Called with what is done and asked for.

    Returns:
        How good it is, by exit; also in `posterior.json` and `table.md`.

    Raises:
        ValueError: No exits, too few documents, layers that are no exits, or a folder of something else.
    """
    config = config or PosteriorConfig()
    if lm.exits is None:
        raise ValueError("the model has no exits; attach some, such as Exits.fresh(lm.split, rank=0)")
    layers = config.layers or lm.exits.layers
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"the layers are {layers}; give ascending layers, each once")
    if strange := [layer for layer in layers if layer not in lm.exits.layers]:
        raise ValueError(f"layer {strange[0]} is no exit of the model, which has {lm.exits.layers}; name some of these")
    policy = ExitPolicy(exit_layers=layers, vocabulary=config.vocabulary, vocabulary_size=config.vocabulary_size)
    pruning = resolve(policy, lm.num_layers, lm.vocabulary).pruning
    with locked(folder, "another calibration runs"):
        tokens, splits = cache_tokens(
            lm, documents, folder / "features", layers=lm.exits.layers, window=window, seed=config.seed,
            progress=progress,
        )  # fmt: skip
        views = {}
        for name in ("tune", "calibrate", "test"):
            if name == "calibrate" and "conformal" not in config.methods:
                continue
            views[name] = views_of(
                lm.split, tokens[name], layers, candidates=config.candidates, pruning=pruning,
                protected=list(ends_of(lm.model.generation_config)),
                to_text=config.to_text, progress=_named(progress, f"reading out to {name}"),
            )  # fmt: skip
        laplace, sets = None, _sets(config, views)
        if "laplace" in config.methods:
            factors = factors_of(lm.split, tokens["fit"], layers, _named(progress, "fitting factors"))
            laplace = _tuned(config, factors, views["tune"], lm.vocabulary, progress)
        exits = lm.exits.only(layers)
        sizes = dict.fromkeys(layers) if pruning is None else pruning.sizes(layers)
        settings = {
            "layers": list(layers), "candidates": config.candidates, "seed": config.seed,
            "target": "text" if config.to_text else "full model", "lenses": fingerprint(exits.adapters),
            "pruning": None if pruning is None else {
                "vocabulary": config.vocabulary, "vocabulary_size": config.vocabulary_size
            },
            "sizes": {str(layer): size for layer, size in sizes.items()}, "splits": splits, "window": window,
            "dtype": str(lm.model.dtype).removeprefix("torch."), "about": dict(about or {}),
            "machine": describe(lm.split.device),
        }  # fmt: skip
        posterior = Posterior.of(settings, laplace=laplace, config=config.laplace, **sets)
        report = judge(posterior, views, progress)
        _save(lm, exits.with_posterior(posterior), folder, config, report)
    return report


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(done, total, what)


def _tuned(
    config: PosteriorConfig, factors: Mapping[int, Any], views: TokenViews, vocabulary: int, progress: Progress | None
) -> dict[int, tuple[TokenLaplace, TokensTuned]]:
    draws, found = standard_draws(config.laplace, vocabulary), {}
    for number, (layer, view) in enumerate(views.exits.items()):
        if progress is not None:
            progress(number, len(views.exits), f"tuning exit {layer}")
        found[layer] = tune_tokens(factors[layer], view.rows, draws, config.laplace, name=f"exit {layer}")
    return found


def _sets(config: PosteriorConfig, views: Mapping[str, TokenViews]) -> dict[str, Any]:
    """The sets asked for, calibrated."""
    found: dict[str, ConformalSets | EvidenceSets] = {}
    if "conformal" in config.methods:
        found["conformal"] = conformal(views["tune"].surprise(), views["calibrate"].surprise(), config.alpha)
    if "avcs" in config.methods:
        tuning = views["tune"]
        found["avcs"] = evidence_sets(
            tuning.ids, tuning.logits, tuning.place, tuning.positions, config.alpha, seed=config.seed
        )
    return found


def _save(lm: LanguageModel, exits: Exits, folder: Path, config: PosteriorConfig, report: PosteriorReport) -> None:
    save_exits(exits, folder / "exits", model=lm.name, fingerprint=fingerprint(lm.model))
    write_json(folder / "posterior.json", {**report.to_dict(), "config": asdict(config)})
    (folder / "table.md").write_text(report.table() + "\n", encoding="utf-8")
