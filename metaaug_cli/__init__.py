"""Post-training quantization of vision networks down to 2 bits, deployed as integer ONNX.

Public names are resolved on first use (PEP 562), so importing the package, and with it
``metaaug --help``, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from metaaug_cli.calibration.data import CalibrationSet as CalibrationSet
    from metaaug_cli.calibration.data import load_calibration_set as load_calibration_set
    from metaaug_cli.deployment.export import export_onnx as export_onnx
    from metaaug_cli.errors import MetaAugError as MetaAugError
    from metaaug_cli.networks.models import load_model as load_model
    from metaaug_cli.pipeline import QuantizedModel as QuantizedModel
    from metaaug_cli.pipeline import quantize as quantize
    from metaaug_cli.recipe.config import Recipe as Recipe
    from metaaug_cli.recipe.config import load_recipe as load_recipe
    from metaaug_cli.runs.finished import load_run as load_run
    from metaaug_cli.synthesis.dgh import SynthesisSettings as SynthesisSettings
    from metaaug_cli.synthesis.dgh import synthesize_calibration_set as synthesize_calibration_set
    from metaaug_cli.verification.evaluation import Evaluation as Evaluation
    from metaaug_cli.verification.parity import Parity as Parity
    from metaaug_cli.verification.parity import check_parity as check_parity

# No public name may equal a module name: importing the module would rebind the attribute.
_HOME = {
    "CalibrationSet": "calibration.data",
    "Evaluation": "verification.evaluation",
    "MetaAugError": "errors",
    "Parity": "verification.parity",
    "QuantizedModel": "pipeline",
    "Recipe": "recipe.config",
    "SynthesisSettings": "synthesis.dgh",
    "check_parity": "verification.parity",
    "export_onnx": "deployment.export",
    "load_calibration_set": "calibration.data",
    "load_model": "networks.models",
    "load_recipe": "recipe.config",
    "load_run": "runs.finished",
    "quantize": "pipeline",
    "synthesize_calibration_set": "synthesis.dgh",
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
