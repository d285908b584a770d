"""A small study of fair distillation: coloured digits, small networks, a few epochs."""

from dataclasses import replace

from offramp.distillation import DataConfig, Network, Study

READOUT = {"*": {"weights": {"readout": {"learning_rate": 0.01}}}}
"""Settings of methods: a readout that learns something of so few rows."""


def small_study(epochs):
    """Of 200 training rows; students and teachers learn for so many epochs."""
    options = {"train": 200, "val": 60, "test": 110, "agreement": 0.85}
    made = Study(
        DataConfig("stand-in:digits-on-colour", options=options), Network("small-cnn:4"), Network("small-cnn:6")
    )
    training, teaching = (replace(each, epochs=epochs) for each in (made.training, made.teacher_training))
    return replace(made, training=training, teacher_training=teaching)
