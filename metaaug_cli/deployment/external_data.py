"""ONNX files that keep their weights in other files beside them."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from metaaug_cli.errors import InputError


def require_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a file whose weights are not where it says.

    Args:
        model: Read without its external data.
        path: Where it was read from.

    Raises:
        InputError: A file that it names is missing.
    """
    stored = {ExternalDataInfo(t).location for t in model.graph.initializer if uses_external_data(t)}
    missing = sorted(place for place in stored if not (path.parent / place).is_file())
    if missing:
        raise InputError(
            f"{path} keeps its weights in {missing[0]}, which is not beside it",
            hint="copy that file into the same folder",
        )
