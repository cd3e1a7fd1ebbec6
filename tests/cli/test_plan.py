"""``metaaug quantize --plan``: what a run would do, and what is said before it begins."""

import pytest
from quantize_command import LEARNED, command, flat

from metaaug_cli.cli.app import main


@pytest.mark.parametrize(
    ("flags", "hinted"),
    [
        (["--wbits", "2"], True),
        ([], False),
        (["--wbits", "2", "--method", "nearest"], False),
        (["--wbits", "2", "--synthetic", "1"], False),
    ],
)
def test_few_images_at_two_bits_are_told_of_made_ones(digits, capsys, flags, hinted):
    assert main(command(digits, *flags, "--plan")) == 0
    assert ("40 are few: --synthetic 256" in flat(capsys.readouterr().err)) is hinted


@pytest.mark.parametrize(
    ("flags", "hinted"),
    [([], False), (["--wbits", "2"], True), (["--wbits", "2", "--augment", "none"], False)],
)
def test_many_images_at_two_bits_are_told_what_the_default_costs(digits, capsys, monkeypatch, flags, hinted):
    monkeypatch.setattr("metaaug_cli.cli.quantize._FEW_IMAGES", 30)
    assert main(command(digits, *flags, "--plan")) == 0
    shown = flat(capsys.readouterr().err)
    assert ("MetaAug runs by default at 2 bits; with more than 30 images" in shown) is hinted
    assert "are few" not in shown


def test_plan_shows_every_block_and_writes_nothing(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(command(digits, "--plan")) == 0
    out, _ = capfd.readouterr()
    assert list(tmp_path.iterdir()) == []
    assert "7 blocks" in flat(out)
    assert "of learning" in flat(out)
    for name in ("stem.0", "body.0", "body.1", "head"):
        assert any(line.split()[:1] == [name] for line in out.splitlines()), name


def test_a_method_that_learns_nothing_is_not_planned_at_no_seconds_of_learning(digits, capfd):
    assert main(command(digits, "--method", "gptq", "--plan")) == 0
    shown = flat(capfd.readouterr().out)
    assert "nothing is learned" in shown
    assert "of learning" not in shown


def test_settings_of_an_augmenter_that_is_not_learned_are_pointed_out(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    forgotten = ["--set", "metaaug.steps=2", "--plan"]
    assert main(command(digits, *forgotten)) == 0
    assert "warning: --set metaaug.steps=2 has no effect" in flat(capfd.readouterr().err)
    assert main(command(digits, *forgotten, "--augment", "metaaug")) == 0
    assert "has no effect" not in flat(capfd.readouterr().err)


def test_a_plan_that_holds_back_every_image_is_refused(digits, capfd):
    assert main(command(digits, "--holdout", "100000", "--plan")) == 2
    assert "leave none to learn from" in flat(capfd.readouterr().err)


def test_plan_tells_the_augmenters_share(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(command(digits, *LEARNED, "--plan")) == 0
    assert "learned augmenter: residual, 2 steps for each block but the first" in flat(capfd.readouterr().out)
    assert list(tmp_path.iterdir()) == []
