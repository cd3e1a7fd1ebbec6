"""From what the user typed (a name, a Python file, a ``.pt2``) to a network with its preprocessing."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import typing
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import EllipsisType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.networks.checkpoints import read_weights
from metaaug_cli.networks.factories import build_from_file, seeded
from metaaug_cli.networks.preprocessing import Preprocessing, Resize
from metaaug_cli.networks.pt2_archive import load_program
from metaaug_cli.networks.weights import (
    StateDict,
    apply_state_dict,
    cached_weights,
    hash_state,
    resized_head,
    tensors_in,
    weights_not_reachable,
)

_logger = logging.getLogger(__name__)

RANDOM = "random"
_RANDOM_TEXT = "random (--weights random)"
_AUXILIARY = r"(aux\d*|AuxLogits)\."
_TIMM_PROBE_S = 10


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to be captured, with the preprocessing that belongs to it.

    Args:
        module: Eval mode, CPU, float32; a program when it came from a ``.pt2`` file.
        name: Short name for people and file names, e.g. ``resnet18`` or ``cifar_resnet.resnet20``.
        preprocessing: How images become its input.
        weights: Where the weights came from, for people.
        weights_sha256: Hash of the state dict, hex.
    """

    module: nn.Module | ExportedProgram
    name: str
    preprocessing: Preprocessing
    weights: str
    weights_sha256: str


@dataclass(frozen=True)
class _Source:
    """A network before the user's preprocessing flags are applied."""

    module: nn.Module | ExportedProgram
    name: str
    weights: str
    preprocessing: Preprocessing | None = None
    size: tuple[int, int] | None = None


def load_model(
    spec: str,
    *,
    weights: Path | str | None = None,
    size: int | tuple[int, int] | None = None,
    resize: Resize | EllipsisType = ...,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: str | None = None,
    fallback: Preprocessing | None = None,
) -> LoadedModel:
    """Load a network and decide its preprocessing.

    Args:
        spec: torchvision name, ``timm:NAME``, ``FILE.py:FACTORY``, or a ``torch.export`` ``FILE.pt2``.
        weights: A weights file; the name of one of torchvision's weight sets; ``"random"`` for
            untrained weights; ``None`` for the model's published (or the factory's own) weights.
        size: Input height and width in pixels (one number for a square).
        resize: Short side before the centre crop, see ``Preprocessing``; leave out for the model's own.
        mean: Per-channel mean on the [0, 1] pixel scale.
        std: Per-channel standard deviation on the [0, 1] pixel scale.
        interpolation: Filter of the resize.
        fallback: The preprocessing of a model that does not say its own.

    Raises:
        InputError: The model or its weights cannot be found, read or fitted together.
        UsageError: Flags that do not go together, or preprocessing that nobody stated.
    """
    source = _load_source(spec, weights)
    if source.preprocessing is None and fallback is not None:
        source = replace(source, preprocessing=fallback)
    overrides = {"size": size, "mean": mean, "std": std, "interpolation": interpolation}
    preprocessing = _resolve_preprocessing(source, overrides, resize)
    if isinstance(source.module, nn.Module):
        source.module.eval()  # apart from the next: a train() of the user's may return nothing
        source.module.to("cpu", torch.float32).requires_grad_(False)
    module = source.module
    state = tensors_in(module) if isinstance(module, nn.Module) else module.state_dict
    _require_finite(state, source.weights)
    digest = hash_state(state)
    return LoadedModel(source.module, source.name, preprocessing, source.weights, digest)


def _require_finite(state: Mapping[str, torch.Tensor], weights: str) -> None:
    broken = [n for n, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise InputError(
            f"NaN or infinite values in the weights, {weights}: {broken[0]}{more}",
            hint="the training may have diverged; pass weights from an earlier epoch",
        )


def _load_source(spec: str, weights: Path | str | None) -> _Source:
    if spec.startswith("timm:"):
        return _from_timm(spec.removeprefix("timm:"), weights)
    if spec.endswith(".pt2"):
        return _from_program(Path(spec), weights)
    file, colon, factory = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), factory, weights)
    if spec.endswith(".py"):
        return _from_file(Path(spec), "", weights)
    return _from_torchvision(spec, weights)


def _resolve_preprocessing(
    source: _Source, overrides: dict[str, Any], resize: Resize | EllipsisType
) -> Preprocessing:
    """Flags first, then what belongs to the model; nothing is guessed that changes the numbers."""
    given = {key: value for key, value in overrides.items() if value is not None}
    if isinstance(given.get("size"), int):
        given["size"] = (given["size"], given["size"])
    if not isinstance(resize, EllipsisType):
        given["resize"] = resize
    default = source.preprocessing
    if default is not None:
        if "size" in given and "resize" not in given and isinstance(default.resize, int):
            given["resize"] = round(default.resize * max(given["size"]) / max(default.size))
        return replace(default, **given)
    if source.size is not None:
        given.setdefault("size", source.size)
    unstated = [f"--{key}" for key in ("size", "mean", "std") if key not in given]
    if unstated:
        raise UsageError(
            f"{source.name} does not say how its images are prepared: {', '.join(unstated)} missing",
            hint="pass what it was trained with, e.g. --size 224 --mean .485,.456,.406 --std .229,.224,.225",
        )
    return Preprocessing(**{"resize": "auto", "interpolation": "bilinear", **given})


def _from_file(path: Path, factory: str, weights: Path | str | None) -> _Source:
    module, own_weights = build_from_file(path, factory, ask_weights=weights is None)
    text = f"own weights of {path.name}:{factory}"
    if weights is not None and str(weights) != RANDOM:
        read = read_weights(Path(weights))
        apply_state_dict(module, read.state, str(weights))
        text = read.text
    elif weights is not None:
        text = _RANDOM_TEXT
    elif not own_weights:
        raise UsageError(
            f"{path}:{factory} gives randomly initialised weights",
            hint="pass the trained ones with --weights FILE (or --weights random if that is meant)",
        )
    return _Source(module, f"{path.stem}.{factory}", text)


def _from_program(path: Path, weights: Path | str | None) -> _Source:
    if weights is not None:
        raise UsageError(
            f"--weights cannot be combined with {path.name}, which holds its own weights",
            hint="leave --weights out, or pass the network as FILE.py:FACTORY",
        )
    program = load_program(path)
    wrong = {str(t.dtype) for t in program.state_dict.values() if t.is_floating_point()} - {"torch.float32"}
    if wrong:
        raise InputError(
            f"{path} holds {', '.join(sorted(wrong))} weights", hint="export the network in float32"
        )
    return _Source(program, path.stem, path.name, size=_image_size(program))


def _image_size(program: ExportedProgram) -> tuple[int, int] | None:
    """Height and width fixed in the program's only input, if there is one."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        shape: tuple[object, ...] = tuple(getattr(node.meta.get("val"), "shape", ()))
        if node.name in inputs and len(shape) == 4:
            height, width = shape[2:]
            if isinstance(height, int) and isinstance(width, int):
                return height, width
    return None


def _from_torchvision(name: str, weights: Path | str | None) -> _Source:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise _unknown_name(name, models.list_models(module=models))
    entry, state, text = _torchvision_weights(name, models.get_model_weights(name), weights)
    options = _builder_options(models.get_model_builder(name), entry)
    module = _seeded(models.get_model, name, weights=None, **options)
    if state is not None:
        classes = resized_head(module, state)
        if classes is not None:
            module = _seeded(models.get_model, name, weights=None, num_classes=classes, **options)
        apply_state_dict(module, state, text, ignore=_AUXILIARY)
    return _Source(module, name, text, _torchvision_preprocessing(entry, options))


def _torchvision_weights(
    name: str, entries: Any, weights: Path | str | None
) -> tuple[Any, StateDict | None, str]:
    """The weight set whose transforms apply, the weights (``None``: random), and their description."""
    wanted = str(weights) if weights is not None else "DEFAULT"
    if wanted == RANDOM:
        return entries.DEFAULT, None, _RANDOM_TEXT
    path = Path(wanted)
    if wanted in entries.__members__:
        entry = entries[wanted]
        path = cached_weights(entry.url)
    elif path.is_file():
        published = (e for e in entries if PurePosixPath(e.url).name == path.name)
        entry = next(published, entries.DEFAULT)
    else:
        raise InputError(
            f"--weights {weights} is neither a file nor a weight set of {name}",
            hint=f"weight sets of {name}: {', '.join(entries.__members__)}",
        )
    read = read_weights(path)
    text = f"torchvision {entry.name}" if wanted in entries.__members__ else read.text
    return entry, _modern_names(read.state), text


def _builder_options(builder: Any, entry: Any) -> dict[str, Any]:
    """Constructor arguments that depend on the weight set, as torchvision's own builders pass them."""
    network = typing.get_type_hints(builder).get("return")
    accepted = inspect.signature(network).parameters if inspect.isclass(network) else {}
    options: dict[str, Any] = {}
    if "aux_logits" in accepted:
        options |= {"aux_logits": False, "transform_input": False}
    if "init_weights" in accepted:
        options["init_weights"] = False
    if "image_size" in accepted and "min_size" in entry.meta:
        options["image_size"] = entry.meta["min_size"][0]
    return options


def _torchvision_preprocessing(entry: Any, options: dict[str, Any]) -> Preprocessing:
    transforms = entry.transforms()
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if "transform_input" in options:
        # The published weights were trained on [-1, 1]; torchvision re-normalises inside the network,
        # here the preprocessing does it, which leaves those layers out of the quantized graph.
        mean = std = (0.5,) * len(mean)
    crop, resize = transforms.crop_size, transforms.resize_size
    size = (crop[0], crop[-1])
    return Preprocessing(size, resize[0], transforms.interpolation.value, mean, std)


def _modern_names(state: StateDict) -> StateDict:
    """Rename the layers of torchvision's DenseNet files, which keep an older scheme."""
    pattern = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")
    return {pattern.sub(r"\1\2", name): tensor for name, tensor in state.items()}


def _unknown_name(name: str, known: list[str]) -> InputError:
    if name.lower().endswith((".pth", ".pt", ".safetensors", ".bin", ".ckpt")):
        return InputError(
            f"{name} holds weights, not a network",
            hint=f"name the network too: FILE.py:FACTORY --weights {name}, or resnet18 --weights {name}",
        )
    if name.lower().endswith(".onnx"):
        return InputError(
            f"{name} cannot be quantized: MODEL is a PyTorch network",
            hint="pass a torchvision name, timm:NAME, FILE.py:FACTORY or FILE.pt2",
        )
    close = difflib.get_close_matches(name, known, n=3)
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else "other forms: timm:NAME, FILE.py:FACTORY, FILE.pt2"
    )
    return InputError(f"torchvision has no image classifier named {name!r}", hint=hint)


def _from_timm(name: str, weights: Path | str | None) -> _Source:
    try:
        import timm
    except ImportError as exc:
        raise InputError(f"timm:{name} needs the timm package", hint="pip install timm") from exc
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(f'timm:{c}' for c in close)}?" if close else None
        raise InputError(f"timm has no model named {name!r}", hint=hint)
    if weights is None:
        module, text = _timm_published(name)
    elif str(weights) == RANDOM:
        module, text = _seeded(timm.create_model, name), _RANDOM_TEXT
    else:
        read = read_weights(Path(weights))
        module, text = _seeded(timm.create_model, name), read.text
        classes = resized_head(module, read.state)
        if classes is not None:
            module = _seeded(timm.create_model, name, num_classes=classes)
        apply_state_dict(module, read.state, str(weights))
    return _Source(module, f"timm.{name}", text, _timm_preprocessing(module, timm))


def _timm_published(name: str) -> tuple[nn.Module, str]:
    """A timm model with its published weights, loaded by timm from a local file."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(f"timm publishes no weights for {name!r}", hint="pass --weights FILE")
    if config.hf_hub_id:
        path = _timm_hub_file(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    else:
        path = str(cached_weights(str(config.url)))
    module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path})
    return module, f"timm {config.tag or config.architecture}"


def _timm_hub_file(repository: str, file: str) -> str:
    """A file of timm's hub, from the local cache where it has it."""
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return cached
    probe = urllib.request.Request(hf_hub_url(repository, file), method="HEAD")
    try:
        # The hub client retries for most of a minute before it admits that there is no network.
        urllib.request.urlopen(probe, timeout=_TIMM_PROBE_S).close()
        return str(hf_hub_download(repository, file))
    except (OSError, urllib.error.URLError) as exc:
        raise weights_not_reachable(f"{file} of {repository}", "fill the hub cache", exc) from exc


def _timm_preprocessing(module: nn.Module, timm: Any) -> Preprocessing:
    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    if config.get("crop_mode", "center") != "center":
        _logger.warning("the model asks for %r cropping; a centre crop is used", config["crop_mode"])
    interpolation = config["interpolation"] if config["interpolation"] != "random" else "bilinear"
    resize = int(max(height, width) / config["crop_pct"])
    mean, std = (tuple(config[key][:channels]) for key in ("mean", "std"))
    return Preprocessing((height, width), resize, interpolation, mean, std)


def _seeded(build: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a builder so that untrained weights are the same every time."""
    with seeded(0):
        return build(*args, **kwargs)
