"""Decoding with exits: policies, confidences, pruned readouts, the keys and values of skipped layers, and the one loop.

It stands on `offramp.families` and knows neither wings nor files of theirs: what trained exits or a posterior add to a
test they bring themselves, as a `confidence.Confidence`.
"""
