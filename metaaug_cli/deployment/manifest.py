"""The quantization manifest: what an exported file says about itself, stored in its ONNX metadata."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metaaug_cli.errors import InputError

METADATA_KEY = "metaaug"
SCHEMA_VERSION = 1


class Packing(BaseModel):
    """How codes are stored and what it takes to load the file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    mode: Literal["int8", "packed", "native"] = "int8"
    least_onnxruntime: str = ""
    session_options: dict[str, str] = Field(default_factory=dict)


class Manifest(BaseModel):
    """What was quantized, how, and what was measured.

    Unknown fields are dropped when reading, so that files of later versions can still be inspected.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = SCHEMA_VERSION
    model: str
    placement: Literal["integer", "full", "academic"]
    method: str
    weight_bits: dict[str, int] = Field(
        default_factory=dict, description="layer name to bits of its weight codes"
    )
    act_bits: dict[str, int] = Field(default_factory=dict, description="quantizer name to bits of its codes")
    recipe: dict[str, Any] = Field(default_factory=dict)
    recipe_sha256: str = ""
    weights_sha256: str = ""
    calibration_sha256: str = ""
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=lambda: package_versions())
    metrics: dict[str, Any] = Field(default_factory=dict)
    packing: Packing = Packing()


def package_versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that shape an exported file."""
    found = {"python": platform.python_version()}
    for name in ("metaaug", "torch", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(model: onnx.ModelProto, manifest: Manifest) -> None:
    """Put a manifest into a model's metadata, replacing an older one."""
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=METADATA_KEY, value=manifest.model_dump_json())


def read_manifest(model: onnx.ModelProto) -> Manifest | None:
    """The manifest of a model, or None for a file that another tool made.

    Raises:
        InputError: The manifest is there but cannot be read.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    if text is None:
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(
            f"the quantization manifest of the ONNX file is damaged: {problems}",
            hint="export the file again with `metaaug export`",
        ) from error
