"""Post-training quantization of vision networks down to 2 bits, deployed as integer ONNX.

Public names are resolved on first use (PEP 562), so importing the package, and with it
``metaaug --help``, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from metaaug_cli.config import Recipe as Recipe
    from metaaug_cli.config import load_recipe as load_recipe
    from metaaug_cli.data import CalibrationSet as CalibrationSet
    from metaaug_cli.data import load_calibration_set as load_calibration_set
    from metaaug_cli.errors import MetaAugError as MetaAugError
    from metaaug_cli.evaluation import Evaluation as Evaluation
    from metaaug_cli.export import export_onnx as export_onnx
    from metaaug_cli.models import load_model as load_model
    from metaaug_cli.parity import Parity as Parity
    from metaaug_cli.parity import check_parity as check_parity
    from metaaug_cli.pipeline import QuantizedModel as QuantizedModel
    from metaaug_cli.pipeline import quantize as quantize

# No public name may equal a module name: importing the module would rebind the attribute.
_HOME = {
    "CalibrationSet": "data",
    "Evaluation": "evaluation",
    "MetaAugError": "errors",
    "Parity": "parity",
    "QuantizedModel": "pipeline",
    "Recipe": "config",
    "check_parity": "parity",
    "export_onnx": "export",
    "load_calibration_set": "data",
    "load_model": "models",
    "load_recipe": "config",
    "quantize": "pipeline",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
