"""What an exit really knows: probabilities made honest, and sets and intervals that shrink with depth.

Everything here works on features and logits of exits (`ExitOutputs`), knows neither transformers nor files of data, and
reads config -> state -> fit -> apply. Arithmetic of fits is float64; everything is deterministic given a seed.
"""
