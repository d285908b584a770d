"""Matrices in four bits: which of them stay what they are, and that all others do not get them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import offramp
from few_bits import model_in, sixteen_values, weight_of_tiles
from offramp import LanguageModel
from offramp.native import kernels as lib
from offramp.native.kernels import NativeError
from offramp.native.model import NativeModel
from offramp.native.weights import FourBits, Part, Weights
from tiny import tiny

DTYPES = [torch.float32, torch.bfloat16]


def linear(weight):
    made = torch.nn.Linear(*weight.shape[::-1], bias=False)
    made.weight = torch.nn.Parameter(weight)
    return Part(made)


def logits_of(model, ids):
    return model.readout(model.run(model.start(ids), 0, model.num_layers).hidden)[0]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 15), st.sampled_from(DTYPES), st.integers(0, 99))
def test_sixteen_equally_spaced_values_stay_what_they_are(rows, cols, levels, dtype, seed):
    """Whichever of them a group has: its smallest and largest need not be the first and the last."""
    weight = sixteen_values(torch.randn(rows, cols), levels, seed).to(dtype)
    largest = weight.float().abs().max()
    away = (weight_of_tiles(weight)[:, :cols] - weight.float()).abs()
    assert float(away.max()) <= float(largest) * 2**-7
    if cols % 32 == 0:  # of a few columns in a last group, more than one spacing may be near enough
        assert float(away.square().mean().sqrt()) <= float(largest) * (2e-4 if dtype == torch.float32 else 2**-9)


def test_scales_of_many_groups_are_those_of_least_squares():
    """Numbers and true values are known, and of these the rounding to bfloat16 is lost, not added to."""
    exact = sixteen_values(torch.randn(64, 640, generator=torch.Generator().manual_seed(1)))
    kept = weight_of_tiles(exact.bfloat16())
    rounding = (exact.bfloat16().float() - exact).square().mean().sqrt()
    assert float((kept - exact).square().mean().sqrt()) < 0.5 * float(rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_all_alike(dtype):
    weight = torch.full((3, 70), 0.25, dtype=dtype)
    weight[1] = 0
    weight[2, 32:] = -4
    torch.testing.assert_close(weight_of_tiles(weight)[:, :70], weight.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("where", [(0, 0), (19, 5), (39, 63)])
def test_one_other_value_is_enough_to_be_refused(where):
    weight = sixteen_values(torch.randn(40, 64))
    assert FourBits.of(weight) is not None
    group = slice(where[1] // 32 * 32, where[1] // 32 * 32 + 32)
    step = weight[where[0], group].sort().values.diff().max()
    weight[where] += 0.4 * step
    assert FourBits.of(weight) is None
    assert FourBits.of(torch.randn(40, 64)) is None


def test_matrices_side_by_side_have_one_format():
    """They read the same inputs, which are rounded in one way."""
    torch.manual_seed(0)
    spaced, other = sixteen_values(torch.randn(20, 64)), torch.randn(20, 64)
    weights = Weights("int4")
    assert [matrix.format for matrix in weights.matrices([linear(spaced), linear(spaced)])] == [lib.INT4] * 2
    assert weights.share_in_four_bits == 1
    assert [matrix.format for matrix in weights.matrices([linear(spaced), linear(other)])] == [lib.INT8] * 2
    assert weights.share_in_four_bits == 0.5
    assert weights.matrix(linear(spaced)).format == lib.INT8  # whose rows may be asked for one by one
    assert [matrix.format for matrix in Weights("int8").matrices([linear(spaced)])] == [lib.INT8]


def test_some_blocks_in_four_bits_and_some_in_eight(caplog):
    model = model_in("int4", tiny("llama"))
    model.model.layers[1].mlp.up_proj.weight.data.normal_()
    lm = LanguageModel(model, name="half", engine="native", rounded="int4")
    whole = NativeModel(model_in("int4", tiny("llama")), rounded="int4").share_in_four_bits
    assert 0.2 < lm.decoder.share_in_four_bits < whole < 1
    assert f"of half, {lm.decoder.share_in_four_bits:.0%} are read in four bits, the rest in eight" in caplog.text
    assert lm.number_format == "int4, native"
    eight = LanguageModel(model, engine="native", rounded="int8")
    got, want = (logits_of(each.decoder, torch.arange(3, 15)[None]) for each in (lm, eight))
    assert 0 < float((got - want).std()) < 0.1 * float(want.std())


def test_a_model_of_other_values_is_refused(tmp_path):
    with pytest.raises(NativeError, match="no matrix .* sixteen equally spaced values .*; give dtype='int8'"):
        LanguageModel(tiny("llama"), engine="native", rounded="int4")
    model_in("int4", model_in("bfloat16", tiny("llama"))).save_pretrained(tmp_path)
    assert offramp.load(tmp_path, dtype="int4").number_format == "int4, native"
