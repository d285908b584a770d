"""What a training run does: the options, checked, and the schedule they describe."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from offramp.training.schedule import CURRICULA, PRECISIONS, SCHEDULES, WEIGHTS, Schedule
from offramp.values import ArgumentError, listed

TRAINABLE = ("exits", "drafter", "lora", "all")


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, and how.

    Where only the exits are trained, they have separate parameters and Adam divides by the size of a gradient, so
    `weights` between them only matter in the norm that `clip` bounds.

    `offramp train` has an option for each field, and its help from here (`offramp.cli.options`).

    Attributes:
        layers: Exits; None: a default for the depth.
        trainable: "exits": a small adapter (lens) per exit, the model stays the same bit for bit. "drafter": exits that
            there are, or none, get a drafter, which proposes tokens from before the first block for the full model to
            check, and alone learns. "lora": low-rank adapters in all blocks, merged in the end. "all": every weight.
            With these two the model itself learns the text as well.
        rank: Rank of each exit's matrix; None: full; 0: none, which lora and all default to.
        blocks: Transformer blocks of its own that each exit gets before its matrix, or the drafter (0 is 1 there).
        unroll: Drafts in a row that a drafter learns to make.
        prompt_weight: Of a prompt's position in what a drafter learns; an answer's weighs 1.
        lora_rank: Rank of LoRA's products; their scale is 2.
        objective: What an exit learns. "forward-kl": the last layer's whole distribution; "reverse-kl": its main mode;
            "teacher-argmax": the last layer's choice; "labels": the next word of the text (CALM, FREE). "consistency":
            exits that there are stay as they are, a classifier learns where their choice is the last layer's, for the
            confidence "classifier"; "consistency-settled": and that of every deeper exit.
        temperature: Softens both distributions of a divergence.
        weights: Of the losses of exits and, with lora and all, the last layer: "uniform"; "layer": proportional to it;
            "layerskip"; "last": none of the exits', the same training without exits, to compare with (lora or all).
        hidden_loss: Weight of FREE's term between hidden states (one exit; lora or all).
        layer_dropout: LayerSkip's dropout of blocks: the last block's rate (lora or all).
        curriculum: LayerSkip's: "rotational": one exit at a step, in turn; "gradual": from the deepest to the first,
            over half of the training (lora or all). None: all exits at every step.
        prompt_layer: Train for prompts that stop after this layer, as a policy's prompt layer says.
        learning_rate: Of AdamW, after the warm-up; None: 1e-3 exits and drafter, 2e-4 lora, 1e-4 all.
        weight_decay: Of AdamW; for a lens, towards the untrained readout.
        steps: Updates; None: 500, unless tokens are given.
        tokens: Train on this many positions, up to the end of a step, instead of so many steps.
        batch_size: Windows per step, over all processes.
        micro_batch: Windows at once; their gradients are added up to a step's, which changes nothing but what is chosen
            by the windows at hand (deep layers in the hidden loss). None: all.
        positions: Most positions per window that are read out, drawn anew each step; None: all.
        precision: "bf16": compute in bfloat16 under autocast, weights stay as they are; None: as loaded.
        warmup: Steps over which the learning rate rises.
        schedule: Of the learning rate: "cosine" or "linear" (falling to 0 at the end), or "constant".
        clip: Largest norm of a gradient.
        seed: Of the data's order and division, of first values and of samples.
        validate_every: Steps between judgements; None: before and after.
        save_every: Steps between checkpoints.

    Raises:
        ValueError: A value out of range.
    """

    layers: tuple[int, ...] | None = None
    trainable: str = "exits"
    rank: int | None = None
    blocks: int = 0
    unroll: int = 3
    prompt_weight: float = 0.2
    lora_rank: int = 16
    objective: str = "forward-kl"
    temperature: float = 1.0
    weights: str = "uniform"
    hidden_loss: float = 0.0
    layer_dropout: float = 0.0
    curriculum: str | None = None
    prompt_layer: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 4
    micro_batch: int | None = None
    positions: int | None = None
    precision: str | None = None
    warmup: int = 10
    schedule: str = "cosine"
    clip: float | None = 1.0
    seed: int = 0
    validate_every: int | None = None
    save_every: int = 50

    def __post_init__(self) -> None:
        from offramp.training import consistency
        from offramp.training.objectives import OBJECTIVES

        choices: dict[str, Collection[str | None]] = {
            "objective": (*OBJECTIVES, *consistency.OBJECTIVES), "weights": WEIGHTS, "schedule": SCHEDULES,
            "trainable": TRAINABLE, "precision": PRECISIONS,
            "curriculum": (None, *CURRICULA),
        }  # fmt: skip
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {listed(value, allowed)}")
        if self.steps is not None and self.tokens is not None:
            raise ArgumentError("give one of `steps` and `tokens`, to say when training ends")
        if self.steps is None and self.tokens is None:
            object.__setattr__(self, "steps", 500)
        self._check_numbers()
        self._check_idle()
        self._check_blocks()
        self._check_backbone()

    def _check_numbers(self) -> None:
        from offramp.training.objectives import SOFTENED

        least_one = ("steps", "tokens", "batch_size", "micro_batch", "positions", "validate_every", "save_every")
        for name in (*least_one, "lora_rank", "prompt_layer", "unroll"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate is None:
            rates = {"exits": 1e-3, "drafter": 1e-3, "lora": 2e-4, "all": 1e-4}
            object.__setattr__(self, "learning_rate", rates[self.trainable])
        for name in ("learning_rate", "temperature", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        if self.temperature != 1 and self.objective not in SOFTENED:
            raise ValueError(f"objective {self.objective!r} has no temperature; {' and '.join(SOFTENED)} have one")
        if min(self.warmup, self.weight_decay, self.prompt_weight) < 0:
            raise ValueError("warmup, weight_decay and prompt_weight must not be negative")

    def _check_idle(self) -> None:
        """Refuse what has no effect on what is trained."""
        needs = {"unroll": self.drafter, "prompt_weight": self.drafter, "lora_rank": self.trainable == "lora"}
        for name, used in needs.items():
            if not used and getattr(self, name) != getattr(TrainConfig, name):
                kind = "lora" if name == "lora_rank" else "drafter"
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which trainable {self.trainable!r} does not use; leave it out, "
                    f"or give trainable {kind!r}"
                )
        if self.classifiers and self.rank:
            raise ValueError(f"rank is {self.rank}, but objective {self.objective!r} trains no lenses; leave it out")

    def _check_blocks(self) -> None:
        if self.drafter:
            object.__setattr__(self, "blocks", self.blocks or 1)
            others = {
                "layers": None, "rank": None, "objective": "forward-kl", "temperature": 1.0, "weights": "uniform",
            }  # fmt: skip
            for name, value in others.items():
                if getattr(self, name) != value:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, which a drafter does not use; leave it out")
        if self.blocks and (self.backbone or self.classifiers or self.prompt_layer is not None):
            raise ValueError(
                f"blocks is {self.blocks}, but blocks of the exits' own are trained on a model that stays as it is, "
                "behind whole prompts; leave trainable at 'exits' and prompt_layer out"
            )

    def _check_backbone(self) -> None:
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(f"layer_dropout is {self.layer_dropout}; give a rate in [0, 1)")
        if self.layer_dropout and self.prompt_layer is not None:
            raise ValueError("layer_dropout and prompt_layer do not go together; leave one out")
        if not 0 <= self.hidden_loss < math.inf:
            raise ValueError(f"hidden_loss is {self.hidden_loss}; give a weight of at least 0")
        if self.backbone:
            if self.classifiers:
                raise ValueError(f"objective {self.objective!r} trains classifiers only; leave trainable at 'exits'")
            if self.rank is None:
                object.__setattr__(self, "rank", 0)
            return
        if self.rank == 0 and not (self.classifiers or self.blocks):
            raise ValueError(
                "rank 0 is no lens, so there is nothing to train; give a rank, or trainable 'lora' or 'all'"
            )
        acting = {name: getattr(self, name) for name in ("layer_dropout", "hidden_loss", "curriculum")}
        for name, value in {**acting, "weights 'last'": self.weights == "last"}.items():
            if value:
                raise ValueError(f"{name} acts on the backbone, which is not trained; give trainable 'lora' or 'all'")

    @property
    def backbone(self) -> bool:
        """Whether the model's own weights change."""
        return self.trainable in ("lora", "all")

    @property
    def drafter(self) -> bool:
        """Whether a drafter is trained, and nothing else."""
        return self.trainable == "drafter"

    @property
    def classifiers(self) -> bool:
        """Whether classifiers are trained, and nothing else."""
        from offramp.training import consistency

        return self.objective in consistency.OBJECTIVES

    @property
    def run_schedule(self) -> Schedule:
        """What the loop goes by."""
        total = self.tokens if self.steps is None else self.steps
        assert total is not None
        assert self.learning_rate is not None
        return Schedule(
            total, self.learning_rate, self.schedule, self.warmup, self.clip, self.seed, self.validate_every,
            self.save_every, by_tokens=self.steps is None,
        )  # fmt: skip
