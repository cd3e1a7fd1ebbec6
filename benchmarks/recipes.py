"""What each shipped recipe reaches, as it stands: ``python benchmarks/recipes.py``.

ResNet-20, up to 256 calibration images, 5 000 test images in ONNX Runtime, seed 0. The quickest recipes
come first. Finished runs are kept in benchmarks/results/recipes.jsonl and not repeated. One thread:
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse

from common import is_recorded, measure, record, resnet20

from metaaug_cli.recipe.config import load_recipe

RECIPES = (
    "w8a8", "w4a4-gptq", "w2a4-gptq", "few-shot-32", "few-shot-32-synthetic",
    "w2a2-metaaug-fast", "w2a4-metaaug-fast", "w4a4-metaaug-fast",
    "w2a2", "w2a4", "w4a4", "w2a2-metaaug", "w2a4-metaaug", "w4a4-metaaug",
)  # fmt: skip
_IMAGES = 256


def main() -> None:
    """Measure every recipe that is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=RECIPES, help="leave the other recipes out")
    subject = resnet20()
    for name in parser.parse_args().only or RECIPES:
        recipe = load_recipe(name)
        num = min(recipe.calibration.num, _IMAGES)
        key = {"model": subject.name, "recipe": name, "sha256": recipe.sha256()[:12], "num": num, "seed": 0}
        if is_recorded("recipes", key):
            continue
        values = measure(subject, [], num=num, seed=0, base=recipe)
        values.pop("seconds_per_block")
        record("recipes", key, values)
        print(key, values, flush=True)


if __name__ == "__main__":
    main()
