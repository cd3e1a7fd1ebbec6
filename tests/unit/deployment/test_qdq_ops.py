"""The deployed operators on hand-made numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaaug_cli.deployment.qdq_ops import (
    dequantize_bias,
    dequantize_codes,
    dequantize_weight,
    fake_quantize,
    global_average_pool,
    quantize_codes,
    translation_table,
)


def test_codes_round_half_to_even_and_saturate():
    x = torch.tensor([-9.0, -0.25, 0.25, 0.75, 1.25, 9.0])
    codes = quantize_codes(x, torch.tensor(0.5), 2, 0, 3)
    assert codes.tolist() == [0, 2, 2, 3, 3, 3]  # -0.5 and 0.5 go to 0, 1.5 and 2.5 to 2 before the clip


def test_fake_quantize_gives_values_on_the_grid():
    x = torch.tensor([-1.0, -0.4, 0.1, 0.6, 7.0])
    got = fake_quantize(x, torch.tensor(0.5), 1, 0, 3)
    assert got.tolist() == [-0.5, -0.5, 0.0, 0.5, 1.0]


@given(
    x=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    scale=st.floats(0.015625, 8, width=32),
    bits=st.integers(2, 8),
    signed=st.booleans(),
)
def test_fake_quantize_is_idempotent_and_near(x, scale, bits, signed):
    scale, zero_point, greatest = torch.tensor(scale), 2 ** (bits - 1) if signed else 0, 2**bits - 1
    values = torch.tensor(x)
    once = fake_quantize(values, scale, zero_point, 0, greatest)
    assert torch.equal(fake_quantize(once, scale, zero_point, 0, greatest), once)
    codes = quantize_codes(values, scale, zero_point, 0, greatest)
    assert torch.equal(once, dequantize_codes(codes, scale, zero_point))
    inside = (codes > 0) & (codes < greatest)
    assert bool(((once - values).abs()[inside] <= 0.5001 * scale + 1e-5).all())


def test_weights_have_one_scale_per_output_channel():
    codes = torch.tensor([[[1, -2]], [[3, 4]]], dtype=torch.int8)
    got = dequantize_weight(codes, torch.tensor([0.5, 10.0]))
    assert got.tolist() == [[[0.5, -1.0]], [[30.0, 40.0]]]


def test_bias_keeps_large_codes():
    codes = torch.tensor([100_000, -3], dtype=torch.int32)
    assert dequantize_bias(codes, torch.tensor([0.5, 2.0])).tolist() == [50_000.0, -6.0]


def test_global_average_pool_keeps_four_axes():
    x = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert global_average_pool(x).tolist() == [[[[1.5]], [[5.5]]]]


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (fake_quantize, (torch.randn(2, 3), torch.tensor(0.1), 8, 0, 15)),
        (dequantize_weight, (torch.ones(2, 3, dtype=torch.int8), torch.ones(2))),
        (dequantize_bias, (torch.ones(2, dtype=torch.int32), torch.ones(2))),
        (global_average_pool, (torch.randn(2, 3, 4, 4),)),
    ],
)
def test_shapes_for_tracing_agree_with_the_operators(operator, arguments):
    checks = ("test_schema", "test_faketensor")
    results = torch.library.opcheck(operator, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_has_an_onnx_form():
    translated = {str(operator) for operator in translation_table()}
    assert translated == {
        "metaaug.fake_quantize.default",
        "metaaug.dequantize_weight.default",
        "metaaug.dequantize_bias.default",
        "metaaug.global_average_pool.default",
    }
