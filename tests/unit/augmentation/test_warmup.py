"""Warming up a UNet: it learns the identity, is kept by content, and is refused where it has not learned."""

import pytest
import torch
from networks import images

from metaaug_cli.augmentation.augmenter import Augmenter, AugmenterSpec, image_variance
from metaaug_cli.augmentation.warmup import LARGEST_ERROR, identity_error, warm_up
from metaaug_cli.errors import MetaAugError
from metaaug_cli.files import cache_directory
from metaaug_cli.networks.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((8, 8), None, "bilinear", (0.5,) * 3, (0.5,) * 3)
PICTURES = images(16).clamp(-1, 1)
STEPS = 250


def unet(width=16):
    spec = AugmenterSpec(base_width=width)
    return Augmenter(spec, PREPROCESSING, (8, 8), image_variance(PICTURES), seed=0).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("warmup")


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.setenv("METAAUG_CACHE", str(folder))


@pytest.fixture(scope="module")
def warmed(folder):
    """One warm-up: (augmenter, what it said, steps that were seen)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAAUG_CACHE", str(folder))
        made_by, ticks = unet(), []
        said = warm_up(made_by, PICTURES, steps=STEPS, seed=0, tick=lambda i, n: ticks.append((i, n)))
    return made_by, said, ticks


def test_it_learns_the_identity(warmed):
    made_by, said, ticks = warmed
    assert ticks == [(i, STEPS) for i in range(1, STEPS + 1)]
    with torch.no_grad():
        error = (made_by.network(PICTURES) - PICTURES).square().mean() / image_variance(PICTURES)
    assert said.error == pytest.approx(float(error), rel=1e-4)
    assert said.error < LARGEST_ERROR < identity_error(unet(), PICTURES)
    assert (said.steps, said.cached) == (STEPS, False)
    assert not made_by.training
    assert all(p.requires_grad for p in made_by.parameters())


def test_the_same_warm_up_is_not_trained_twice(warmed):
    made_by, said, _ = warmed
    again, ticks = unet(), []
    repeated = warm_up(again, PICTURES, steps=STEPS, seed=0, tick=lambda i, n: ticks.append((i, n)))
    assert ticks == []
    assert repeated.cached
    assert repeated.error == said.error
    for name, value in made_by.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value), name
    assert not again.training


@pytest.mark.parametrize("change", [{"images": PICTURES[:12]}, {"seed": 1}, {"steps": 2}])
def test_other_images_seeds_and_lengths_are_other_warm_ups(warmed, change, monkeypatch):
    monkeypatch.setattr("metaaug_cli.augmentation.warmup.LARGEST_ERROR", 100.0)
    monkeypatch.setattr("metaaug_cli.augmentation.warmup._save", lambda *_: None)
    trained = []
    monkeypatch.setattr("metaaug_cli.augmentation.warmup._train", lambda *_: trained.append(1))
    warm_up(unet(), **{"images": PICTURES, "steps": STEPS, "seed": 0} | change)
    assert trained == [1]


def test_a_damaged_file_is_trained_over(warmed, folder, monkeypatch):
    (path,) = (folder / "warmup").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:100])
    made_by, _, _ = warmed
    monkeypatch.setattr(
        "metaaug_cli.augmentation.warmup._train",
        lambda t, *_: t.network.load_state_dict(made_by.network.state_dict()),
    )
    assert not warm_up(unet(), PICTURES, steps=STEPS, seed=0).cached
    assert path.read_bytes() == content


def test_one_that_has_not_learned_is_refused_and_not_kept(warmed, folder):
    before = set((folder / "warmup").iterdir())
    with pytest.raises(MetaAugError, match="has not learned to reproduce its input") as caught:
        warm_up(unet(), PICTURES, steps=1, seed=0)
    assert "metaaug.warmup_steps" in caught.value.hint
    assert set((folder / "warmup").iterdir()) == before


def test_one_that_diverged_is_refused(monkeypatch):
    monkeypatch.setattr(
        "metaaug_cli.augmentation.warmup._train", lambda t, *_: t.network.last.bias.data.fill_(torch.nan)
    )
    with pytest.raises(MetaAugError, match="error nan"):
        warm_up(unet(), PICTURES, steps=3, seed=0)


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_a_cache_that_cannot_be_written_only_warns(monkeypatch, tmp_path, caplog, taken):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAAUG_CACHE", str(tmp_path / "file" if taken == "folder" else tmp_path))
    if taken == "file":
        monkeypatch.setattr("metaaug_cli.files.os.replace", _no_space)
    monkeypatch.setattr("metaaug_cli.augmentation.warmup.LARGEST_ERROR", 100.0)
    assert not warm_up(unet(4), PICTURES, steps=1, seed=0).cached
    assert "not kept for later runs" in caplog.text


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_without_a_home_nothing_is_kept(monkeypatch):
    for name in ("METAAUG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("metaaug_cli.augmentation.warmup.Path.home", homeless)
    monkeypatch.setattr("metaaug_cli.augmentation.warmup.LARGEST_ERROR", 100.0)
    assert cache_directory() is None
    assert not warm_up(unet(4), PICTURES, steps=1, seed=0).cached


def test_where_warm_ups_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("METAAUG_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("METAAUG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "metaaug"
