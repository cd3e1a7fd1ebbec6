"""Layouts: values and shapes stay, memory order changes, and reading in memory order copies nothing."""

import pytest
import torch

from metaaug_cli.layout import Layout, fast_layout

SHAPES = [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (4, 7), (3,), (2, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turn", [False, True])
def test_flat_and_shaped_are_inverse_views(shape, turn):
    x = torch.randn(shape)
    if turn:
        x = fast_layout(x)
    layout = Layout.of(x)
    flat = layout.flat(x)
    assert flat.dim() == 1
    assert flat.data_ptr() == x.data_ptr()
    again = layout.shaped(flat)
    assert torch.equal(again, x)
    assert again.data_ptr() == x.data_ptr()
    assert Layout.of(again) == layout


def test_images_get_their_channels_last_and_keep_their_values():
    x = torch.randn(2, 3, 4, 5)
    turned = fast_layout(x)
    assert torch.equal(turned, x)
    assert turned.permute(0, 2, 3, 1).is_contiguous()
    assert Layout.of(turned).channels_last
    assert not Layout.of(x).channels_last
    assert fast_layout(turned).data_ptr() == turned.data_ptr()


def test_rows_of_features_stay_as_they_are():
    x = torch.randn(4, 7)
    assert fast_layout(x).data_ptr() == x.data_ptr()


def test_values_of_another_layout_are_put_in_order():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(Layout.of(fast_layout(x)).flat(x), fast_layout(x).permute(0, 2, 3, 1).flatten())
    assert torch.equal(Layout.of(x).flat(fast_layout(x)), x.flatten())


def test_other_strides_count_as_the_usual_layout():
    x = torch.randn(2, 3, 4, 6)[..., ::2]
    layout = Layout.of(x)
    assert not layout.channels_last
    assert torch.equal(layout.shaped(layout.flat(x)), x)
