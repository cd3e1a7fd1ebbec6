"""Two sets of one kind are as close as two halves of one; others are farther."""

import pytest
import torch
from networks import ResidualNet, images, trained

from metaaug_cli.calibration.compare import SPLITS, compare_sets
from metaaug_cli.calibration.data import make_calibration_set
from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.graph.bn_statistics import batch_norm_probe
from metaaug_cli.networks.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((8, 8), None, "bilinear", (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def probe():
    return batch_norm_probe(trained(ResidualNet()), (3, 8, 8))


def calibration(tensor):
    return make_calibration_set(tensor, PREPROCESSING, [str(i) for i in range(len(tensor))])


def test_sets_of_one_kind_are_no_farther_than_two_halves(probe):
    farther = []
    for seed in range(6):
        a, b = calibration(images(64, seed=2 * seed)), calibration(images(64, seed=2 * seed + 1))
        found = compare_sets(a, b, probe)
        farther.append(found.farther / SPLITS)
        assert found.distance / found.halves == pytest.approx(1, abs=0.35)
    assert 0.2 < sum(farther) / 6 < 0.8


def test_another_kind_is_farther_and_said_so(probe):
    a, b = calibration(images(40)), calibration(images(40, seed=5) * 1.5 + 0.5)
    seen = []
    found = compare_sets(a, b, probe, names=("real", "made"), progress=lambda *state: seen.append(state))
    assert found.farther == found.splits == SPLITS
    assert found.distance > 3 * found.halves
    assert found.images == 20
    assert found.sentence.startswith(f"real and made are {found.distance:.3f} standard deviations apart")
    assert [layer.name for layer in found.layers] == [layer.name for layer in probe.layers]
    assert all(layer.distance >= 0 for layer in found.layers)
    assert seen[-1] == (80, 80)
    assert found.to_dict()["layers"][0]["name"] == probe.layers[0].name


def test_both_sides_have_equally_many_images(probe):
    found = compare_sets(calibration(images(100)), calibration(images(10, seed=3)), probe)
    assert found.images == 10
    assert compare_sets(calibration(images(100)), calibration(images(90)), probe, num=32).images == 16


def test_the_seed_decides(probe):
    a, b = calibration(images(30)), calibration(images(30, seed=9))
    first, again, other = (compare_sets(a, b, probe, seed=seed).distance for seed in (0, 0, 1))
    assert first == again != other


def test_what_cannot_be_compared(probe):
    with pytest.raises(UsageError, match="too few to compare"):
        compare_sets(calibration(images(7)), calibration(images(7)), probe)
    with pytest.raises(InputError, match="3x8x8 and 3x4x4"):
        compare_sets(calibration(images(8)), calibration(torch.zeros(8, 3, 4, 4)), probe)
