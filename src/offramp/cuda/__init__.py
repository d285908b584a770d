"""Decoding on a CUDA device: the blocks between two exits as one graph, with keys and values at fixed places."""
