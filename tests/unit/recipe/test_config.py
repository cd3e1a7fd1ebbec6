"""Recipes: every mistake is reported, every value survives a round trip, shipped recipes load."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metaaug_cli.errors import RecipeError
from metaaug_cli.prepare import augmentation_kind, augmenter_of, meta_schedule_of
from metaaug_cli.recipe.config import Recipe, load_recipe, shipped_recipes


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "bits", "method"),
    [
        ("w8a8", (8, 8), "nearest"),
        ("w4a4", (4, 4), "genie"),
        ("w2a4", (2, 4), "genie"),
        ("w2a2", (2, 2), "genie"),
    ],
)
def test_shipped_recipe_says_what_its_name_says(name, bits, method):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert (recipe.quantization.weight_bits, recipe.quantization.act_bits) == bits
    assert recipe.reconstruction.method == method


def test_every_file_in_recipes_is_shipped(repository):
    assert set(shipped_recipes()) == {path.stem for path in (repository / "recipes").glob("*.yaml")}


def test_defaults_keep_first_and_last_layer_at_eight_bits_in_integer_placement():
    quantization = Recipe().quantization
    assert quantization.first_last_bits == 8
    assert quantization.other_act_bits == 8
    assert quantization.placement == "integer"


@given(
    bits=st.integers(2, 8),
    first_last=st.one_of(st.just("same"), st.integers(2, 8)),
    lr_scale=st.one_of(st.just("auto"), st.floats(1e-6, 1e3)),
    prob=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    size=st.one_of(st.none(), st.integers(1, 999), st.tuples(st.integers(1, 999), st.integers(1, 999))),
)
def test_dump_and_load_give_an_equal_recipe(tmp_path_factory, bits, first_last, lr_scale, prob, seed, size):
    recipe = Recipe.from_dict(
        {
            "seed": seed,
            "preprocessing": {"size": size},
            "quantization": {"act_bits": bits, "first_last_bits": first_last},
            "reconstruction": {"lr_scale": lr_scale, "quant_prob": prob},
        }
    )
    path = write(tmp_path_factory.mktemp("recipe"), recipe.dump())
    again = load_recipe(path)
    assert again == recipe
    assert again.sha256() == recipe.sha256()


def test_all_mistakes_are_reported_at_once_with_the_value_and_the_nearest_name(tmp_path):
    path = write(
        tmp_path,
        """
seed: -1
calibraton: {num: 3}
quantization: {weight_bit: 4, act_bits: 9, first_last_bits: sme, rounding_lr: 0.1}
reconstruction: {method: geni, iterations: 2.5}
""",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = caught.value.message.splitlines()
    assert lines[0] == f"recipe {path}: 8 mistakes"
    assert {line.strip() for line in lines[1:]} == {
        "seed: must be greater than or equal to 0, not -1",
        "calibraton: unknown key, did you mean calibration?",
        "quantization.weight_bit: unknown key, did you mean quantization.weight_bits?",
        "quantization.act_bits: must be less than or equal to 8, not 9",
        "quantization.first_last_bits: must be a valid integer, unable to parse string as an integer or "
        "'same', not 'sme'",
        "quantization.rounding_lr: unknown key, did you mean reconstruction.rounding_lr?",
        "reconstruction.method: must be 'nearest', 'gptq', 'adaround', 'brecq', 'qdrop' or 'genie', "
        "not 'geni'",
        "reconstruction.iterations: must be a valid integer, got a number with a fractional part, not 2.5",
    }


def test_override_changes_only_the_named_keys():
    before = load_recipe("w4a4")
    after = before.override(["quantization.act_bits=2", "reconstruction.rounding_lr = 1e-2", "seed=7"])
    expected = yaml.safe_load(before.dump())
    expected["quantization"]["act_bits"] = 2
    expected["reconstruction"]["rounding_lr"] = 0.01
    expected["seed"] = 7
    assert yaml.safe_load(after.dump()) == expected
    assert before == load_recipe("w4a4")


def test_override_accepts_lists_and_null():
    recipe = Recipe().override(["preprocessing.mean=[.5, .25, 0]", "preprocessing.size=[8, 9]"])
    assert recipe.preprocessing.mean == (0.5, 0.25, 0.0)
    assert recipe.preprocessing.size == (8, 9)
    assert recipe.override(["preprocessing.mean=null"]).preprocessing.mean is None


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({}, {}),
        ({"size": 32}, {"size": (32, 32)}),
        ({"size": [24, 32], "resize": "none"}, {"size": (24, 32), "resize": None}),
        ({"resize": "auto", "std": [0.5]}, {"resize": "auto", "std": (0.5,)}),
    ],
)
def test_preprocessing_overrides_become_loader_options(overrides, options):
    assert Recipe.from_dict({"preprocessing": overrides}).preprocessing.load_options() == options


def test_override_reports_all_its_mistakes():
    with pytest.raises(RecipeError) as caught:
        Recipe().override(
            ["reconstruction.iteration=3", "seed", "quantization=8", "nowhere.key=1", "calibration.num=0"]
        )
    message = caught.value.message
    assert message.startswith("--set: 5 mistakes")
    assert "reconstruction.iteration: unknown key, did you mean reconstruction.iterations?" in message
    assert "'seed' is not section.key=value" in message
    assert "quantization is a section: set one of its keys, weight_bits" in message
    assert "nowhere: unknown key" in message
    assert "calibration.num: must be greater than or equal to 1, not 0" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization": {"weight_bits": 8, "weight_symmetric": False}}, "does not fit into int8"),
        ({"reconstruction": {"beta_start": 2, "beta_end": 20}}, "beta_end 20 is above beta_start 2"),
        ({"preprocessing": {"mean": [0.5], "std": [1, 1, 1]}}, "mean has 1 channels but std has 3"),
        ({"preprocessing": {"std": [0.5, 0, 0.5]}}, "greater than 0"),
        ({"reconstruction": {"rounding_lr": float("nan")}}, "finite number"),
        ({"calibration": 4}, "must be a section with keys"),
    ],
)
def test_values_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict(settings)


def test_hash_follows_settings_but_not_the_name():
    base = Recipe()
    assert base.sha256() == Recipe(name="other").sha256()
    assert base.sha256() != base.override(["reconstruction.scale_norm=2.0"]).sha256()


def test_recipes_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3
    with pytest.raises(ValueError, match="frozen"):
        Recipe().quantization.act_bits = 3


def test_unnamed_recipe_takes_its_file_name_and_empty_sections_mean_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, "calibration:\nquantization: {act_bits: 3}\n"))
    assert recipe.name == "mine"
    assert recipe == Recipe.from_dict({"name": "mine", "quantization": {"act_bits": 3}})
    assert load_recipe(write(tmp_path, "# nothing\n")) == Recipe(name="mine")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice .line 2."),
        ("quantization: {act_bits: 4\n", "not valid YAML"),
        ("- seed\n", "must be a mapping of sections, not list"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path, text))


def test_unknown_names_and_missing_files_say_what_exists(tmp_path):
    with pytest.raises(RecipeError, match="no recipe named 'w4a44', did you mean 'w4a4'") as caught:
        load_recipe("w4a44")
    names = sorted(path.stem for path in (Path(__file__).parents[3] / "recipes").glob("*.yaml"))
    assert {"few-shot-32", "w2a2-metaaug", "w4a4"} <= set(names)
    assert caught.value.hint == f"give a .yaml file or one of: {', '.join(names)}"
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_full_placement_refuses_bits_of_its_own_for_some_tensors():
    full = Recipe().override(["quantization.placement=full", "quantization.first_last_bits=same"])
    assert full.override(["quantization.placement=integer"]).quantization.placement == "integer"
    for key in ("first_last_bits", "other_act_bits", "stem_output_bits"):
        with pytest.raises(RecipeError, match=rf"{key} 6 has no place in full placement"):
            full.override([f"quantization.{key}=6"])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (["quantization.weight_bits=2", "quantization.act_bits=2"], "metaaug"),
        (["quantization.weight_bits=2"], "metaaug"),
        (["quantization.act_bits=2"], "metaaug"),
        ([], "none"),
        (["quantization.weight_bits=2", "reconstruction.method=nearest"], "none"),
        (["quantization.weight_bits=2", "augmentation.kind=flip"], "flip"),
    ],
)
def test_two_bits_learn_on_the_augmenters_copies_unless_told_otherwise(settings, kind):
    assert augmentation_kind(Recipe().override(settings)) == kind


@pytest.mark.parametrize(
    ("name", "epsilon"), [("w2a2-metaaug", 0.3), ("w2a4-metaaug", 0.1), ("w4a4-metaaug", 0.1)]
)
def test_the_metaaug_recipes_have_the_papers_weights(name, epsilon):
    recipe = load_recipe(name)
    assert augmentation_kind(recipe) == "metaaug"
    schedule = meta_schedule_of(recipe)
    assert (schedule.val_weight, schedule.margin_weight, schedule.preserve_weight) == (5.0, 0.5, 3e4)
    assert augmenter_of(recipe).epsilon == epsilon
    assert augmenter_of(recipe.override(["metaaug.epsilon=auto"])).epsilon == epsilon


def test_a_recipe_that_nests_without_end_is_refused(tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text("a: " + "[" * 100_000)
    with pytest.raises(RecipeError, match=r"nested too deeply|not valid YAML"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"nested too deeply|flow"):
        Recipe().override(["seed=" + "[" * 100_000])


def test_changes_name_the_setting_and_both_values():
    later = Recipe().override(["reconstruction.iterations=7", "seed=3"])
    assert later.changes_since(later.model_copy(update={"name": "other"})) == []
    changed = later.changes_since(Recipe())
    assert changed[0] == "seed: 0 -> 3"
    assert changed[1].startswith("reconstruction.iterations: ")
    assert changed[1].endswith(" -> 7")


def test_aliases_are_refused_before_they_grow(tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text("calibration:\n  num: [&a [x, x], &b [*a, *a], [*b, *b]]\n")
    with pytest.raises(RecipeError, match=r"aliases \(\*name\) are not for recipes"):
        load_recipe(path)


@pytest.mark.parametrize("value", ["2020-13-45", "9" * 5000])
def test_values_that_yaml_makes_and_python_does_not_are_recipe_errors(tmp_path, value):
    path = tmp_path / "odd.yaml"
    path.write_text(f"seed: {value}\n")
    with pytest.raises(RecipeError, match=r"odd\.yaml holds a value that cannot be read"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="seed: the value cannot be read"):
        Recipe().override([f"seed={value}"])


def test_a_large_wrong_value_is_shown_in_brief():
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"seed": [[["x" * 1000] * 1000] * 1000] * 1000})
    assert len(caught.value.message) < 500
