"""The words of ``--augment``: what may be joined with what, and what a mistake is told."""

import pytest

from metaaug_cli.augmentation import fixed as augment
from metaaug_cli.errors import RecipeError
from metaaug_cli.recipe.augment_kinds import OPERATION_NAMES, check_kind, learned_part, parse_kind
from metaaug_cli.recipe.config import Recipe


def test_every_word_has_its_operation_in_the_same_order():
    assert tuple(augment.OPERATIONS) == OPERATION_NAMES


def test_the_order_of_a_kind_does_not_matter():
    assert parse_kind("mixup+flip") == parse_kind("flip + mixup") == ["flip", "mixup"]
    assert parse_kind("cutmix+trivial-geometric+crop") == ["crop", "trivial-geometric", "cutmix"]


def test_none_is_no_operation():
    assert parse_kind("none") == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", (False, "none")),
        ("flip+mixup", (False, "flip+mixup")),
        ("metaaug", (True, "none")),
        ("metaaug+trivial-geometric", (True, "trivial-geometric")),
        ("metaaug + mixup + flip", (True, "mixup+flip")),
    ],
)
def test_the_learned_part_is_separated(kind, expected):
    assert learned_part(kind) == expected


@pytest.mark.parametrize("kind", ["none", "auto", "metaaug", "metaaug+rand", "trivial", "flip+cutmix"])
def test_what_a_recipe_may_say(kind):
    check_kind(kind)
    assert Recipe().override([f"augmentation.kind={kind}"]).augmentation.kind == kind


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("sharpen", "no augmentation named 'sharpen'"),
        ("flop", "no augmentation named 'flop', did you mean 'flip'?"),
        ("flip+trivial-geometry", "'trivial-geometry', did you mean 'trivial-geometric'?"),
        ("metaug", "'metaug', did you mean 'metaaug'?"),
        ("flip+metaaug", "'metaaug' is learned, comes first and once, not 'flip+metaaug'"),
        ("metaaug+metaaug", "'metaaug' is learned, comes first and once"),
        ("flip+none", "'none' stands alone"),
        ("metaaug+none", "'none' stands alone"),
        ("auto+flip", "'auto' stands alone"),
        ("flip+", "no augmentation named ''"),
        ("", "no augmentation named ''"),
    ],
)
def test_a_mistake_is_told_the_nearest_word(kind, told):
    with pytest.raises(RecipeError) as caught:
        check_kind(kind)
    assert told in caught.value.message
    with pytest.raises(RecipeError) as caught:
        Recipe().override([f"augmentation.kind={kind or chr(39) * 2}"])
    assert "augmentation.kind: " in caught.value.message
    assert told in caught.value.message


def test_auto_is_decided_by_the_caller():
    with pytest.raises(RecipeError, match="decided before"):
        learned_part("auto")


def test_the_fixed_operations_do_not_know_the_learned_one():
    with pytest.raises(RecipeError, match="metaaug"):
        parse_kind("metaaug+flip")
