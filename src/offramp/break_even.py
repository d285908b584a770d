"""Where leaving early pays: FLOPs of a token by exit layer, and the layer at which they equal the full model's."""

from __future__ import annotations

from offramp.costs import ModelShape


def exit_flops(shape: ModelShape, layer: int, first: int | None, kept: int | None = None) -> int:
    """FLOPs of one token that leaves after `layer`: blocks, lenses, readouts, keys and values of the skipped blocks.

    Weights only, as for a short context. The logits of the last test are those the token is taken from. A token that
    reaches layer L has failed all tests and is read out once more, in full.

    Args:
        shape: The model.
        layer: Exit layer, 1..L.
        first: First tested layer; every layer from it on is tested. None: no tests, one readout where it leaves.
        kept: Tokens scored by the tests after the first; None: all V. Copying their head rows is bytes, not FLOPs.

    Returns:
        FLOPs, with a multiply-add counted as 2.
    """
    depth = len(shape.blocks)
    passed = sum(2 * block.weights for block in shape.blocks[:layer])
    filled = sum(shape.fill_flops(index) for index in range(layer, depth))
    full, later, read = shape.readout_flops(), 0, range(layer, layer + 1)
    if first is not None and layer >= first:
        later = min(layer, depth - 1) - first  # tests after the first
        full = full * 2 if layer == depth else full
        read = range(first, layer + 1)
    lenses = sum(2 * shape.lens_weights(index) for index in read)
    return passed + filled + lenses + full + later * shape.readout_flops(kept)


def ratios(shape: ModelShape) -> tuple[float, float]:
    """H = readout / block and φ = fill / block, in FLOPs of the mean block."""
    depth = len(shape.blocks)
    block = sum(2 * block.weights for block in shape.blocks) / depth
    return shape.readout_flops() / block, sum(shape.fill_flops(index) for index in range(depth)) / depth / block


def break_even(shape: ModelShape, first: int, kept: int | None = None, tests: int | None = None) -> float:
    """The exit layer l* at which a token costs as much as in the full model; leaving before it saves FLOPs.

    With H = readout / block, φ = fill / block and every layer from m on tested, a token that leaves after l costs
    l + H(l - m + 1) + φ(L - l) blocks against L + H, its last test being its readout, so

        l* = (L(1 - φ) + H·m) / (1 + H - φ).

    With only n tested layers, spread evenly from m on, H(l - m + 1) becomes H(ρ(l - m) + 1) with ρ = n / (L - m); it is
    1 if every layer is tested. A lens of λ blocks in each test (the mean over the tests) comes on top of H there.

    With a fixed pruned vocabulary the first test scores V tokens and the l - m later ones K: the first test takes the
    place of the full model's readout and the formula keeps its shape, with H_K = H·K/V in place of H. A token that
    never leaves then pays one more full readout than the straight line through the exits says (H - H_K), so means have
    to be compared by `exit_flops`; without pruning the line holds at L as well, and the mean exit layer decides.

    Args:
        shape: The model, its blocks alike.
        first: m, the first tested layer, 1..L-1.
        kept: K; None: V.
        tests: n; None: every layer from m on.

    Returns:
        l*, between m and L where there are no lenses; not a whole number in general.
    """
    head, fill = ratios(shape)
    depth = len(shape.blocks)
    tests = depth - first if tests is None else tests
    lens = sum(shape.lens_weights(layer) for layer in range(first, depth)) / tests
    lens /= sum(block.weights for block in shape.blocks) / depth
    tested = (head * (1 if kept is None else kept / shape.vocabulary) + lens) * tests / (depth - first)
    return (depth * (1 - fill) + tested * first - lens) / (1 + tested - fill)
