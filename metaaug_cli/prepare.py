"""From a recipe to plain arguments: the network prepared for learning, and each block's schedule."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from metaaug_cli.augmentation.augmenter import AugmenterSpec
from metaaug_cli.augmentation.bilevel import MetaSchedule
from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.errors import GraphError, InputError, RecipeError
from metaaug_cli.graph.capture import capture
from metaaug_cli.graph.placement import Bits, place
from metaaug_cli.quantization.blocks import Chain, build_chain
from metaaug_cli.quantization.reconstruct import Schedule, rate_factor
from metaaug_cli.recipe.augment_kinds import AUTO, LEARNED, NONE, learned_part
from metaaug_cli.recipe.config import Recipe

# What each method learns; every other difference between them is a recipe field.
_LEARNS_WEIGHT_SCALE = {"genie"}
_LEARNS_ACT_SCALE = {"brecq", "qdrop", "genie"}
_DROPS = {"qdrop", "genie"}
_LEARNS_NOTHING = {"nearest", "gptq"}
_RATES = {"unet": 5e-6, "residual": 1e-3, "policy": 5e-3}
_PUBLISHED_META_STEPS = 500
_EPSILON_W2A2, _EPSILON = 0.3, 0.1
_FEW_BITS = 2
_CHECKED_IMAGES = 8


def prepare_chain(program: nn.Module | ExportedProgram, input_size: tuple[int, ...], recipe: Recipe) -> Chain:
    """Capture, place and cut: everything before learning, the same each time for the same inputs.

    Raises:
        GraphError: The network cannot be captured or cut, or gives no row of logits for an image.
    """
    module = capture(program, input_size)  # type: ignore[arg-type]
    _require_logits(module)
    settings = recipe.quantization
    placement = place(
        module.graph,
        kind=settings.placement,
        bits=bits_of(recipe),
        weight_symmetric=settings.weight_symmetric,
        act_symmetric=settings.act_symmetric,
        quantize_output=settings.quantize_output,
    )
    return build_chain(
        module,
        placement,
        granularity="layer" if recipe.reconstruction.method == "adaround" else "block",
        max_layers=recipe.reconstruction.max_block_layers,
        scale_norm=recipe.reconstruction.scale_norm,
        power_of_two=settings.scale_power_of_two,
    )


def _require_logits(module: fx.GraphModule) -> None:
    output = next(n for n in module.graph.nodes if n.op == "output").all_input_nodes[0]
    shape = tuple(output.meta["val"].shape[1:])
    hint = "metaaug quantizes image classifiers: wrap the network so that its output is (images, classes)"
    if len(shape) != 1:
        raise GraphError(
            f"the network gives {shape} for an image, not a row of logits",
            hint=f"{hint}, with flatten(1) for one",
        )
    if shape[0] == 0:
        raise GraphError("the network gives no logits for an image: it has 0 classes", hint=hint)
    if not output.meta["val"].dtype.is_floating_point:
        kind = str(output.meta["val"].dtype).removeprefix("torch.")
        raise GraphError(f"the network gives {kind} numbers for an image, not float logits", hint=hint)


def bits_of(recipe: Recipe) -> Bits:
    """The recipe's bit-widths with ``same`` resolved."""
    q = recipe.quantization
    if q.placement == "full":
        return Bits(q.weight_bits, q.act_bits, q.weight_bits, q.act_bits, q.act_bits)
    return Bits(
        weight=q.weight_bits,
        act=q.act_bits,
        first_last_weight=q.weight_bits if q.first_last_bits == "same" else q.first_last_bits,
        first_last_act=q.act_bits if q.first_last_bits == "same" else q.first_last_bits,
        other_act=q.act_bits if q.other_act_bits == "same" else q.other_act_bits,
        stem_output=None if q.stem_output_bits == "same" else q.stem_output_bits,
    )


def learns(recipe: Recipe) -> bool:
    """Whether blocks are learned, rather than rounded once."""
    return recipe.reconstruction.method not in _LEARNS_NOTHING


def starts_second_order(recipe: Recipe) -> bool:
    """Whether weights are rounded by GPTQ, before learning or instead of it."""
    r = recipe.reconstruction
    return r.method == "gptq" or (learns(recipe) and r.start == "second-order")


def schedule_of(recipe: Recipe) -> Schedule:
    """The recipe's reconstruction settings as one block's schedule."""
    r = recipe.reconstruction
    iterations = r.iterations if learns(recipe) else 0
    return Schedule(
        iterations=iterations,
        batch_size=r.batch_size,
        quant_prob=r.quant_prob if r.method in _DROPS else 1.0,
        rounding_lr=r.rounding_lr,
        weight_scale_lr=r.weight_scale_lr,
        act_scale_lr=r.act_scale_lr,
        rate_factor=rate_factor(iterations) if r.lr_scale == "auto" else r.lr_scale,
        rounding_weight=r.rounding_weight,
        rounding_warmup=r.rounding_warmup,
        beta_start=r.beta_start,
        beta_end=r.beta_end,
        # A weight scale that jumps to the next power of two would double every weight under fixed codes.
        learn_weight_scale=r.method in _LEARNS_WEIGHT_SCALE and not recipe.quantization.scale_power_of_two,
        learn_act_scale=r.method in _LEARNS_ACT_SCALE,
    )


def augmentation_kind(recipe: Recipe) -> str:
    """The recipe's kind; ``auto`` is the learned augmenter at 2 bits, but nothing beside made images."""
    kind = recipe.augmentation.kind
    if not learns(recipe):
        return NONE
    if kind != AUTO:
        return kind
    return LEARNED if has_few_bits(recipe) and not recipe.calibration.synthetic else NONE


def fitted_to(recipe: Recipe, calibration: CalibrationSet) -> Recipe:
    """The recipe for these images: ``auto`` is nothing where some of them were made from a network.

    Raises:
        RecipeError: It holds back all of them.
    """
    require_images(len(calibration.images), recipe)
    if calibration.holds_synthetic and recipe.augmentation.kind.strip() == AUTO:
        return recipe.override([f"augmentation.kind={NONE}"])
    return recipe


def has_few_bits(recipe: Recipe) -> bool:
    """Whether weights or activations have so few bits that blocks overfit small sets."""
    return min(recipe.quantization.weight_bits, recipe.quantization.act_bits) <= _FEW_BITS


def method_label(recipe: Recipe) -> str:
    """The method and its augmentation in a few words: ``genie``, ``genie with metaaug``."""
    kind = augmentation_kind(recipe)
    return recipe.reconstruction.method if kind == NONE else f"{recipe.reconstruction.method} with {kind}"


def learns_augmenter(recipe: Recipe) -> bool:
    """Whether the run teaches an augmenter."""
    return learned_part(augmentation_kind(recipe))[0]


def copies_of(recipe: Recipe, images: int) -> int:
    """Copies of each of ``images`` images that a block learns from besides them."""
    learned, operations = learned_part(augmentation_kind(recipe))
    if operations != NONE or (learned and recipe.metaaug.form == "policy"):
        return recipe.augmentation.copies_for(images)
    return 1 if learned else 0


def require_images(count: int, recipe: Recipe) -> None:
    """Whether ``count`` images leave some to learn from.

    Raises:
        RecipeError: All of them would be held back.
    """
    if recipe.calibration.holdout >= count:
        raise RecipeError(
            f"calibration.holdout: {recipe.calibration.holdout} of {count} images leave none to learn from",
            hint="hold back fewer, or give more images",
        )


@torch.no_grad()
def require_finite(chain: Chain, images: Tensor) -> None:
    """Whether the float network gives numbers for the first images, block by block.

    Raises:
        InputError: It gives NaN or infinite values; names the block where they begin.
    """
    values: tuple[Tensor, ...] = (images[:_CHECKED_IMAGES],)
    for block in chain.blocks:
        values = block.float_block(*values)
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise InputError(
                f"block {block.name}: the float network gives NaN or infinite values",
                hint="check the weights, and that the images are prepared for this network (--mean, --std)",
            )


def augmenter_of(recipe: Recipe) -> AugmenterSpec:
    """The augmenter's form and bounds, with ``auto`` resolved."""
    m, q = recipe.metaaug, recipe.quantization
    fewest = max(q.weight_bits, q.act_bits) <= _FEW_BITS
    epsilon = (_EPSILON_W2A2 if fewest else _EPSILON) if m.epsilon == "auto" else m.epsilon
    return AugmenterSpec(m.form, m.base_width, epsilon, m.distance)


def meta_schedule_of(recipe: Recipe) -> MetaSchedule:
    """The recipe's outer steps for one block."""
    m = recipe.metaaug
    rate = _RATES[m.form] * (_PUBLISHED_META_STEPS / m.steps if m.form == "unet" else 1.0)
    return MetaSchedule(
        steps=m.steps,
        batch_size=m.batch_size,
        val_batch_size=m.val_batch_size,
        lr=rate if m.lr == "auto" else m.lr,
        grad_clip=m.grad_clip,
        val_weight=m.val_weight,
        margin_weight=m.margin_weight,
        preserve_weight=m.preserve_weight,
        preservation=m.preservation,
        two_sided=m.distance == "margin",
        inner=m.inner,
        inner_rate=m.inner_rate,
        restart_every=m.restart_every,
        balanced=m.balance,
    )
