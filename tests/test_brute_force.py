"""Generation with exits against a reference that shares no code with it.

The reference has no cache and runs the untouched model on the whole sequence for every token. A position that left
after layer l keeps its state through the deeper blocks: a hook gives it the block's input as output. The model's own
norm and head at the last position then are the readout of its exit. Rows run alone and without padding.
"""

import copy
import math
from functools import cache

import pytest
import torch
import transformers as hf

from offramp import Contrast, ExitPolicy, Exits, LanguageModel
from tiny import DECODER_ONLY, KINDS, VOCABULARY, greedy, inputs_for, tiny

NEW = 10
NEAR = 1e-5  # decisions nearer than this are not compared: take another seed


class Row:
    """One sequence, and the model's readouts of its last position at every depth."""

    def __init__(self, model, inputs, index, prompt=math.inf):
        self.model, self.memory, self.drafts = model, None, 0
        if model.config.is_encoder_decoder:
            source = {key: value[index : index + 1] for key, value in inputs.items()}
            if "input_ids" in source:
                source = {"input_ids": source["input_ids"][source["attention_mask"].bool()][None]}
            with torch.no_grad():
                self.memory = model.get_encoder()(**source).last_hidden_state
            self.ids, self.depths = [model.config.decoder_start_token_id], []
        else:
            self.ids = inputs["input_ids"][index][inputs["attention_mask"][index].bool()].tolist()
            self.depths = [prompt] * (len(self.ids) - 1)  # the prompt goes through all layers, or this many
        self.new = 0
        self.layers, self.confidences = [], []

    @property
    def tokens(self):
        return self.ids[len(self.ids) - self.new :]

    def blocks(self):
        decoder = self.model.get_decoder()
        return next(getattr(decoder, name) for name in ("block", "layers", "h") if hasattr(decoder, name))

    @torch.no_grad()
    def readouts(self):
        """Logits [L, V] and states [L, D] of the last position if it left after layer 1..L; float64."""
        blocks = self.blocks()
        depths = torch.tensor([[*self.depths, depth] for depth in range(1, len(blocks) + 1)])
        states = []

        def freeze(number):
            def hook(block, args, kwargs, output):
                before = args[0] if args else kwargs["hidden_states"]
                after = output[0] if isinstance(output, tuple) else output
                after = torch.where((depths < number)[:, :, None], before, after)
                states.append(after[-1, -1].double())
                return (after, *output[1:]) if isinstance(output, tuple) else after

            return hook

        hooks = [block.register_forward_hook(freeze(i + 1), with_kwargs=True) for i, block in enumerate(blocks)]
        try:
            ids = torch.tensor([self.ids] * len(blocks))
            if self.memory is None:
                output = self.model(input_ids=ids, use_cache=False)
            else:
                memory = self.memory.expand(len(blocks), -1, -1)
                output = self.model(encoder_outputs=(memory,), decoder_input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return output.logits[:, -1].double(), torch.stack(states)

    def append(self, token, layer, confidence, depth):
        """Take a token read after `layer`; the position it was read from goes on at `depth`."""
        self.ids.append(token)
        self.depths.append(depth)
        self.new += 1
        self.layers.append(layer)
        self.confidences.append(confidence)


# ---------------------------------------------------------------- measures, on one row of float64 logits


def gap(scores):
    ordered = scores.sort(descending=True).values
    return float(ordered[0] - ordered[1])


def divergence(a, b):
    mean = (a + b) / 2

    def kl(x):
        return float(torch.where(x > 0, x * (x.clamp(min=1e-300) / mean.clamp(min=1e-300)).log(), 0).sum())

    return kl(a) / 2 + kl(b) / 2


def contrasted(policy, kept, z, layer, first, layers):
    """Contrastive scores over the whole vocabulary, by full softmaxes; `kept` are the scored ids, a bool mask."""
    options = policy.contrast
    p = z[layer - 1].masked_fill(~kept, -math.inf).softmax(-1)
    alpha = options.alpha
    if options.alpha_schedule == "hyperbolic":
        alpha = max(1e-3, alpha / (1 + layer / layers) * (1 - gap(p)))
    head = p >= alpha * p.max()
    if policy.confidence == "contrastive":
        amateurs = [options.amateur or layer // 2]
    elif options.candidates == "all":
        amateurs = list(range(2, layer, options.stride or 1))
    else:
        amateurs = list(range(2, first)) or [1]
    amateurs = [m for m in amateurs if 1 <= m < layer]
    if not amateurs:
        return p

    def weight(m):
        q = z[m - 1].masked_fill(~kept, -math.inf).softmax(-1)
        if options.support == "all":
            return divergence(p[kept], q[kept]) / (layer - m)
        a, b = p[head], q[head]
        if options.support == "head_renorm":
            a, b = a / a.sum(), b / b.sum()
        return divergence(a, b) / (layer - m)

    m = max(amateurs, key=lambda m: (weight(m), m)) if len(amateurs) > 1 else amateurs[0]
    q = z[m - 1].masked_fill(~kept, -math.inf).softmax(-1)
    ratio = torch.where(head, p / q.clamp(min=1e-300), 0)
    mass = {"mass": p[head].sum(), "text": 1.0, "head": p[head].sum()}[options.score]
    inside = ratio / ratio.sum() * mass
    return torch.where(head, inside, torch.zeros_like(p) if options.score == "head" else p)


def confidence(policy, kept, z, h, layer, first, layers, previous):
    p = z[layer - 1].masked_fill(~kept, -math.inf).softmax(-1)
    match policy.confidence:
        case "softmax":
            return gap(p)
        case "max":
            return float(p.max())
        case "entropy":
            p = p[kept]
            return 1 - float(-(p * p.log()).sum()) / math.log(len(p))
        case "state":
            if previous is None:
                return math.nan
            a, b = h[layer - 1], h[previous - 1]
            return float(a @ b / (a.norm() * b.norm()))
    return gap(contrasted(policy, kept, z, layer, first, layers))


# ---------------------------------------------------------------- pruning


def decayed(policy, layer, layers):
    floor = policy.vocabulary_floor or max(2, math.ceil(VOCABULARY / 128))
    start = policy.vocabulary_start or VOCABULARY
    return min(VOCABULARY, max(floor, math.floor(start / (1 + (start - floor) / floor * layer / layers))))


def next_size(policy, layer, first, layers, size, last):
    """How many tokens are scored at `layer`, after a test of confidence `last` on `size` kept tokens."""
    floor = policy.vocabulary_floor or max(2, math.ceil(VOCABULARY / 128))
    given = policy.vocabulary_size
    if policy.vocabulary.endswith("fixed"):
        return size
    if policy.vocabulary.endswith("adaptive"):
        return min(size, max(floor, math.ceil(size * (1 - policy.vocabulary_shrink * min(max(last, 0), 1)))))
    if given is None:
        return decayed(policy, layer, layers)
    return max(min(floor, given), given * decayed(policy, layer, layers) // decayed(policy, first, layers))


class Pruned:
    """Which tokens of one row are scored: all (or the frequent ones) at its first test, then the best of them.

    The protected ones among them always are.
    """

    def __init__(self, policy, exits, layers, eos, frequent=None):
        self.policy, self.exits, self.layers = policy, exits, layers
        self.whole = [v for v in range(VOCABULARY) if frequent is None or v in frequent]
        self.eos = [v for v in eos if v in self.whole]
        self.ranked = None
        self.sizes = []

    @property
    def mask(self):
        kept = torch.zeros(VOCABULARY, dtype=torch.bool)
        kept[self.whole if self.ranked is None else [*self.ranked, *self.eos]] = True
        return kept

    def tested(self, z, layer, last):
        """Order what is kept by the logits z [L, V] of this layer and cut it for the next test."""
        later = [e for e in self.exits if e > layer]
        if self.policy.vocabulary in (None, "frequent") or self.policy.confidence == "state" or not later:
            return  # the cosine of states reads no logits, so there is nothing to rank
        first = self.exits[0]
        if self.ranked is None:
            self.ranked = [v for v in self.whole if v not in self.eos]  # protected ids are never ranked
            self.sizes.append(self.policy.vocabulary_size or decayed(self.policy, first, self.layers))
        self.sizes.append(next_size(self.policy, later[0], first, self.layers, self.sizes[-1], last))
        self.ranked = sorted(self.ranked, key=lambda v: -float(z[layer - 1, v]))[: self.sizes[-1]]


# ---------------------------------------------------------------- generation


def reference(model, inputs, policy, new=NEW, eos=None, frequent=None):  # noqa: C901 - the whole rule in one place
    """Rows as a policy generates them, by brute force."""
    batch = len(next(iter(inputs.values())))
    rows = [Row(model, inputs, index, policy.prompt_layer or math.inf) for index in range(batch)]
    layers = len(rows[0].blocks())
    forced = model.generation_config.forced_eos_token_id
    eos = eos or model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    first = policy.min_layer or layers // 2
    exits = list(policy.exit_layers or range(first, layers))
    first = exits[0]
    taus = policy.threshold if isinstance(policy.threshold, tuple) else [policy.threshold] * len(exits)
    exact = policy.skipped != "propagate"
    sizes = set()
    for position in range(new):
        live = [row for row in rows if not row.new or row.tokens[-1] not in eos]
        readouts = {row: row.readouts() for row in live}
        left = {}  # row: (layer, confidence, scores)
        tests = not (position == 0 and rows[0].memory is None)
        full = [row for row in live if policy.skipped == "verify" and row.drafts == policy.draft_length]
        kept = {row: Pruned(policy, exits, layers, eos, frequent) for row in live}
        last = dict.fromkeys(live, math.nan)
        for index, layer in enumerate(exits if tests else []):
            tau = taus[index]
            if policy.decay == "multiplicative":
                tau = 0.9 * tau + 0.1 * tau * math.exp(-policy.decay_rate * position / new)
            elif policy.decay == "additive":
                tau = min(1, max(0, 0.9 * tau + 0.1 * math.exp(-policy.decay_rate * position / new)))
            staying = [row for row in live if row not in left and row not in full]
            for row in staying:
                z, h = readouts[row]
                previous = exits[index - 1] if index else None
                last[row] = confidence(policy, kept[row].mask, z, h, layer, first, layers, previous)
                assert not abs(last[row] - tau) < NEAR, "too near to call"
            going = [row for row in staying if last[row] > tau]
            if policy.batch == "all" and len(going) < len(staying):
                going = []
            for row in staying:
                z, mask = readouts[row][0], kept[row].mask
                scores = z[layer - 1].masked_fill(~mask, -math.inf)
                if policy.decode_from == "contrastive":
                    scores = contrasted(policy, mask, z, layer, first, layers)
                if row in going:
                    left[row] = layer, scores
                kept[row].tested(z, layer, last[row])
        for row in live:
            z = readouts[row][0]
            scores = z[-1]
            if tests and policy.decode_from == "contrastive" and policy.contrast.full:
                scores = contrasted(policy, torch.ones(VOCABULARY, dtype=torch.bool), z, layers, first, layers)
            layer, scores = left.get(row, (layers, scores))
            assert gap(scores) > NEAR or (policy.skipped == "verify" and layer < layers), "too near to call"
            token, best = int(scores.argmax()), int(z[-1].argmax())
            if forced is not None and position == new - 1:
                token = best = forced
            if policy.skipped == "verify":
                token, layer = best, layer if token == best else layers
                row.drafts = 0 if layer == layers else row.drafts + 1
            row.append(token, layer, last[row], math.inf if exact else layer)
            sizes.update(kept[row].sizes)
    return rows, sizes


def compare(model, inputs, policy, new=NEW, *, frequent=None, engine="auto", **options):
    """Generate and compare; the reference's rows and sizes."""
    rows, sizes = reference(model, inputs, policy, new, options.get("eos_token_id"), frequent)
    lm = LanguageModel(model, engine=engine)
    if frequent is not None:
        lm.attach_exits(Exits.fresh(lm.split, rank=0).with_frequent(frequent))  # no lenses: readouts stay as they are
    result = lm.generate(inputs, policy=policy, max_new_tokens=new, **options)
    assert result.tokens == [row.tokens for row in rows]
    if policy.batch == "all" and policy.skipped == "verify":
        return rows, sizes  # rows that draft stand at different positions, so "all" are others than in the reference
    assert result.exit_layers == [row.layers for row in rows]
    for got, row in zip(result.confidences, rows, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(row.confidences), rtol=0, atol=1e-4, equal_nan=True)
    return rows, sizes


# ---------------------------------------------------------------- models and inputs


LIVELY = {"t5": (0.8, 3.0), "t5-v1.1": (0.5, 0.4), "mt5": (0.5, 0.4), "bart": (0.8, 0.4), "whisper": (0.5, 0.4)}
"""Spread of weights, and of embeddings and head, with which tokens vary and leave after different layers."""
NO_END = 96


@cache
def lively(name):
    """The tiny decoder-only model; an encoder-decoder with weights that make it leave at all depths."""
    if name in DECODER_ONLY:
        return tiny(name)
    model, (spread, embeddings) = copy.deepcopy(tiny(name)), LIVELY[name]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, embeddings if parameter.shape[0] == VOCABULARY else spread)
    return model


@cache
def deep():
    """Seven layers, for measures that look back and for pruning in many steps."""
    torch.manual_seed(5)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 2
    model.generation_config.max_length = None
    return model


def batch_of(name, batch=3, **options):
    return inputs_for(name, batch, padded=batch > 1 and name != "whisper", **options)


def thresholds(name):
    return (0.05, 0.1, 0.11) if name == "gemma3" else (0.1, 0.2, 0.4)  # its soft cap keeps the gaps small


def layers_of(rows):
    """Layers at which tokens left, without the prompt's."""
    return {layer for row in rows for layer in row.layers[1:]}


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("name", KINDS)
def test_rows_leave_at_their_own_layers(name):
    layers, together = set(), True
    for tau in thresholds(name):
        policy = ExitPolicy(threshold=tau, min_layer=1)
        rows, _ = compare(lively(name), batch_of(name), policy, eos_token_id=NO_END)
        layers |= layers_of(rows)
        together &= all(len(set(step)) == 1 for step in zip(*(row.layers for row in rows), strict=False))
    assert len(layers) >= (2 if name == "gemma3" else 3)
    assert not together


@pytest.mark.parametrize("name", KINDS)
def test_one_row(name):
    layers = set()
    for tau in (0.05, *thresholds(name)[:2]):
        policy = ExitPolicy(threshold=tau, min_layer=1)
        rows, _ = compare(lively(name), batch_of(name, 1, length=5, seed=1), policy, new=16, eos_token_id=NO_END)
        layers |= layers_of(rows)
    assert len(layers) >= 2


@pytest.mark.parametrize("skipped", ["defer", "verify"])
@pytest.mark.parametrize("name", KINDS)
def test_exact_keys_and_values(name, skipped):
    policy = ExitPolicy(threshold=thresholds(name)[0], min_layer=1, skipped=skipped, draft_length=3)
    rows, _ = compare(lively(name), batch_of(name), policy, eos_token_id=NO_END)
    if skipped == "defer":
        assert len(layers_of(rows)) >= 2


@pytest.mark.parametrize("kind", ["fixed", "decaying", "adaptive"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "t5", "mt5", "bart", "whisper"])
def test_pruning_in_the_families(name, kind):
    policy = ExitPolicy(threshold=thresholds(name)[1], min_layer=1, vocabulary=kind, vocabulary_size=20)
    rows, sizes = compare(lively(name), batch_of(name), policy, eos_token_id=NO_END)
    assert len(layers_of(rows)) >= 2
    assert len(sizes) == 1 if kind == "fixed" else len(sizes) > 1


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
def test_many_tokens_behind_a_sliding_window(name, skipped):
    policy = ExitPolicy(threshold=thresholds(name)[0], min_layer=1, skipped=skipped)
    rows, _ = compare(lively(name), batch_of(name), policy, new=40, eos_token_id=NO_END)
    assert max(len(row.tokens) for row in rows) == 40


@pytest.mark.parametrize("skipped", ["propagate", "defer"])
@pytest.mark.parametrize("kind", [None, "fixed", "decaying", "adaptive"])
@pytest.mark.parametrize(
    ("measure", "tau"),
    [("softmax", 0.2), ("max", 0.3), ("entropy", 0.4), ("state", 0.9), ("contrastive", 0.3), ("jsd", 0.3)],
)
def test_measures_and_pruning(measure, tau, kind, skipped):
    policy = ExitPolicy(confidence=measure, threshold=tau, min_layer=3, vocabulary=kind, skipped=skipped)
    rows, sizes = compare(deep(), batch_of("llama"), policy)
    assert len(layers_of(rows)) >= 2
    if kind is not None and measure != "state":  # which reads no logits, so nothing is pruned
        assert min(sizes) < VOCABULARY


@pytest.mark.parametrize("measure", ["contrastive", "jsd"])
@pytest.mark.parametrize(
    "options",
    [
        {"score": "text"},
        {"score": "head"},
        {"alpha": 0.5},
        {"alpha_schedule": "hyperbolic"},
        {"amateur": 2},
        {"candidates": "all"},
        {"support": "head"},
        {"support": "head_renorm", "candidates": "all"},
        {"full": True},
    ],
    ids=str,
)
def test_contrast(measure, options):
    layers = set()
    for kind in (None, "decaying"):
        for source in ("logits", "contrastive"):
            policy = ExitPolicy(
                confidence=measure, threshold=0.3, min_layer=4, vocabulary=kind, decode_from=source,
                contrast=Contrast(**options),
            )  # fmt: skip
            rows, _ = compare(deep(), batch_of("llama", 2), policy, new=6)
            layers |= layers_of(rows)
    assert len(layers) >= 3


@pytest.mark.parametrize("kind", ["fixed", "decaying", "adaptive"])
def test_a_contrasted_last_layer_behind_pruned_tests_scores_all_tokens(kind):
    policy = ExitPolicy(
        "jsd", 0.9, min_layer=4, vocabulary=kind, decode_from="contrastive", contrast=Contrast(full=True)
    )  # fmt: skip
    rows, _ = compare(deep(), batch_of("llama", 2), policy, new=6)
    assert 7 in layers_of(rows)


@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": (0.3, 0.2, 0.1, 0.05)},
        {"exit_layers": (3, 5)},
        {"threshold": 0.1, "batch": "all"},
        {"threshold": 0.05, "batch": "all", "vocabulary": "adaptive"},
        {"threshold": 0.3, "decay": "multiplicative"},
        {"threshold": 0.2, "decay": "additive", "decay_rate": 8.0},
        {"vocabulary": "decaying", "vocabulary_floor": 4, "vocabulary_start": 60},
        {"vocabulary": "adaptive", "vocabulary_size": 9, "vocabulary_shrink": 0.5, "exit_layers": (3, 4, 6)},
    ],
    ids=str,
)
def test_other_options(options, skipped):
    policy = ExitPolicy(**{"threshold": 0.15, "min_layer": 3, "skipped": skipped, **options})
    rows, _ = compare(deep(), batch_of("llama"), policy)
    assert skipped == "verify" or len(layers_of(rows)) >= 2


@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
@pytest.mark.parametrize("batch", ["rows", "all"])
@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_rows_that_end_early(name, batch, skipped):
    policy = ExitPolicy(threshold=0.1, min_layer=1, batch=batch, skipped=skipped)
    inputs = batch_of(name, 4)
    ends = [row.tokens[2 + 2 * i] for i, row in enumerate(reference(lively(name), inputs, policy)[0][:2])]
    rows, _ = compare(lively(name), inputs, policy, new=14, eos_token_id=ends)
    assert len({len(row.tokens) for row in rows}) >= 2


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2"])
def test_short_prompts(name, length):
    for skipped in ("propagate", "defer", "verify"):
        for new in (1, 2, 8):
            policy = ExitPolicy(threshold=thresholds(name)[0], min_layer=1, skipped=skipped)
            compare(lively(name), inputs_for(name, 2, length=length), policy, new=new, eos_token_id=NO_END)


@pytest.mark.parametrize("skipped", ["propagate", "defer"])
def test_exits_change_the_output(skipped):
    """Were it otherwise, the tests above would show nothing."""
    changed = 0
    for name in ("llama", "mistral", "t5", "whisper"):
        inputs = batch_of(name)
        policy = ExitPolicy(threshold=0.1, min_layer=1, skipped=skipped)
        rows, _ = reference(lively(name), inputs, policy, eos=NO_END)
        full = greedy(lively(name), inputs, NEW, eos_token_id=NO_END)[:, -NEW:].tolist()
        changed += [row.tokens for row in rows] != full
        verified, _ = reference(lively(name), inputs, ExitPolicy(threshold=0.1, skipped="verify"), eos=NO_END)
        assert [row.tokens for row in verified] == full
    assert changed == 4


def test_frozen_and_exact_positions_differ():
    """The two ways through skipped layers give other confidences: the reference tells them apart."""
    ways = [ExitPolicy(threshold=0.1, min_layer=1, skipped=skipped) for skipped in ("propagate", "defer")]
    frozen, exact = (reference(tiny("llama"), batch_of("llama"), policy)[0] for policy in ways)
    assert [row.confidences[1:] for row in frozen] != [row.confidences[1:] for row in exact]
