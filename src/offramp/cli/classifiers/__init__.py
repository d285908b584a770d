"""The commands for early-exit classifiers: what `train`, `calibrate` and `evaluate` do with their tasks; `classify`."""
