"""What a training run does: the options, checked, and the schedule they describe."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from offramp.training import consistency
from offramp.training.curriculum import CURRICULA
from offramp.training.objectives import OBJECTIVES, SOFTENED
from offramp.training.schedule import PRECISIONS, SCHEDULES, WEIGHTS, Schedule
from offramp.values import ArgumentError, listed

TRAINABLE = ("exits", "drafter", "lora", "all")


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, and how.

    Where only the exits are trained, they have separate parameters and Adam divides by the size of a gradient, so
    `weights` between them only matter in the norm that `clip` bounds.

    Attributes:
        layers: Exits; None: a default for the depth.
        trainable: "exits": a lens per exit (a matrix and a bias), the model stays as it is, bit for bit. "lora":
            low-rank adapters (`peft`) on all linear layers of the blocks, merged into the model in the end. "all":
            every weight of the model. With "lora" and "all" the last layer learns the text as well. Or "drafter": the
            exits that are attached, if any, get one (see `offramp.core.drafter`), which alone learns.
        rank: Of each lens's matrix; None: full; 0: no lens. Leave at None for 0 with "lora" and "all".
        blocks: Transformer blocks of its own that each exit gets before its lens (see `offramp.core.exits`), or that
            the drafter has (0 stands for 1 there).
        unroll: Drafts in a row that a drafter learns to make (see `offramp.training.drafts`).
        prompt_weight: Of a position of a prompt in what a drafter learns of first drafts; one of an answer weighs 1.
        lora_rank: Of LoRA's products; their scale is 2.
        objective: One of `OBJECTIVES`: what exits learn; the last layer always learns the text ("labels"). Or
            "consistency" or "consistency-settled" (see `offramp.training.consistency`): the exits that are attached
            stay as they are, and a classifier for each learns where it is right.
        temperature: Softens both sides of a divergence.
        weights: One of `WEIGHTS`.
        hidden_loss: Weight of FREE's dynamic layer-wise term between hidden states, see
            `offramp.training.objectives.layerwise_loss`; needs one exit and a backbone that is trained.
        layer_dropout: Largest rate at which blocks are skipped per row, rising with depth (LayerSkip, equation 1).
        curriculum: Which exits are trained when, with a backbone that is trained: one of
            `offramp.training.curriculum.CURRICULA`, "rotational" or "gradual"; None: all at every step.
        prompt_layer: Train for `ExitPolicy(prompt_layer=...)`: what stands before an answer stops after this layer,
            which makes training cheaper too.
        learning_rate: After the warm-up; None: 1e-3 for exits and drafter, 2e-4 for LoRA, 1e-4 for all.
        weight_decay: Of AdamW; for a lens, towards the untrained readout.
        steps: How many; None: 500, or else
        tokens: stop at the first step that reaches so many trained positions.
        batch_size: Windows per step, over all processes.
        micro_batch: Windows that go through the model at once; a step adds up their gradients. None: all. The result
            is the same, except for what is chosen by the windows at hand: deep layers in `hidden_loss`.
        positions: Most positions per window whose readouts are trained, drawn anew each time; None: all.
        precision: "bf16": compute in bfloat16 under autocast, weights stay as they are; None: as loaded.
        warmup: Steps over which the learning rate rises.
        schedule: "cosine" or "linear" (falling to 0 at the end), or "constant".
        clip: Largest norm of the gradient; None: any.
        seed: Of the order of the data, first values, dropout.
        validate_every: Steps between judgements on the held-out windows; None: only before and after.
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
        self._check_blocks()
        self._check_backbone()

    def _check_numbers(self) -> None:
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

    def _check_blocks(self) -> None:
        if self.drafter:
            object.__setattr__(self, "blocks", self.blocks or 1)
            others = {
                "layers": None, "rank": None, "objective": "forward-kl", "temperature": 1.0, "weights": "uniform",
            }  # fmt: skip
            for name, value in others.items():
                if getattr(self, name) != value:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, which is nothing to a drafter; leave it away")
        if self.blocks and (self.backbone or self.classifiers or self.prompt_layer is not None):
            raise ValueError(
                f"blocks is {self.blocks}, but blocks of the exits' own are trained on a model that stays as it is, "
                "behind whole prompts; leave trainable at 'exits' and prompt_layer away"
            )

    def _check_backbone(self) -> None:
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(f"layer_dropout is {self.layer_dropout}; give a rate in [0, 1)")
        if self.layer_dropout and self.prompt_layer is not None:
            raise ValueError("layer_dropout and prompt_layer do not go together; leave one away")
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
        for name in ("layer_dropout", "hidden_loss", "curriculum"):
            if getattr(self, name):
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
