"""Tiny models whose exits have a posterior made by hand, so that tokens leave at all depths."""

import torch

from offramp import Exits, LanguageModel
from offramp.core.vocabulary import Pruning
from offramp.hub.exit_posterior import Posterior
from offramp.runs.digests import fingerprint
from offramp.uncertainty import candidates
from offramp.uncertainty.candidates import LaplaceConfig, standard_draws
from offramp.uncertainty.laplace import Factors
from offramp.uncertainty.token_sets import ConformalSets, EvidenceSets
from offramp.uncertainty.tuning import TokensTuned
from test_brute_force import lively
from tiny import VOCABULARY

LAYERS = (1, 2, 3)
CANDIDATES = 12


def with_posterior(
    name, *, model=None, layers=LAYERS, vocabulary=None, size=None, prior=0.3, limit=2.5, tau=1.0, alpha=0.2, rank=None,
    rival=False, lens=None,
):  # fmt: skip
    """The model, its exits without lenses (or with random ones), and a posterior fitted on random states."""
    lm = LanguageModel(lively(name) if model is None else model)
    torch.manual_seed(0)
    exits = Exits.fresh(lm.split, layers, rank=0 if lens is None else None)
    with torch.no_grad():
        for parameter in exits.lenses.parameters():
            parameter.normal_(0, lens)
    lm.attach_exits(exits)
    config = LaplaceConfig(rank=rank, rest_as_rival=rival)
    laplace = {}
    for layer in layers:
        x = lm.split.readout_input(torch.randn(60, lm.split.shape.width), layer).detach()
        factors = Factors.empty(x.shape[1], VOCABULARY, bias=False, diagonal=True)
        factors = factors.update(x, lm.split.project(x).detach())
        omega = prior / float(x.square().sum(-1).mean())
        state = candidates.fit(factors, omega, standard_draws(config, VOCABULARY), config, temperature=1.0 + layer / 9)
        laplace[layer] = state.single(), TokensTuned(1.0 + layer / 9, omega, prior, 0.0, (), ())
    sizes = dict.fromkeys(layers)
    if vocabulary is not None:
        sizes = Pruning(vocabulary, VOCABULARY, lm.num_layers, layers[0], size).sizes(layers)
    knots = {layer: torch.tensor([[0.0, 3.0 + 0.1 * layer], [0.0, 3.0]]) for layer in layers}
    posterior = Posterior.of(
        {
            "layers": list(layers), "candidates": CANDIDATES, "lenses": fingerprint(exits.lenses),
            "pruning": None if vocabulary is None else {"vocabulary": vocabulary, "vocabulary_size": size},
            "sizes": {str(layer): n for layer, n in sizes.items()},
        },
        laplace=laplace, config=config, conformal=ConformalSets(0.1, limit, knots),
        avcs=EvidenceSets(alpha, dict.fromkeys(layers, tau), 3),
    )  # fmt: skip
    lm.attach_exits(exits.with_posterior(posterior))
    return lm
