"""A finished run, read back from its directory: to evaluate and export it without the user's own code."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.errors import InputError, RecipeError
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.networks.pt2_archive import load_program
from metaaug_cli.quantization.blocks import Chain
from metaaug_cli.recipe.config import Recipe, load_recipe
from metaaug_cli.runs.artifacts import (
    FLOAT_FILE,
    ONNX_FILE,
    RECIPE_FILE,
    REPAIR,
    RunDirectory,
    read_info,
    read_metrics,
)


@dataclass(frozen=True)
class Run:
    """A finished run, read back: everything to evaluate and export it without the user's own code."""

    path: Path
    info: dict[str, Any]
    recipe: Recipe

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the network's input."""
        return Preprocessing.from_dict(self.info["preprocessing"])

    @property
    def num_outputs(self) -> int:
        """Classes of the network."""
        return int(self.info["num_outputs"])

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""
        preprocessing = self.preprocessing
        return (preprocessing.channels, *preprocessing.size)

    @cached_property
    def chain(self) -> Chain:
        """The network as blocks, quantizers loaded."""
        from metaaug_cli.prepare import prepare_chain

        chain = prepare_chain(self._program(), self.input_size, self.recipe)
        directory = RunDirectory(self.path)
        for block in chain.blocks:
            directory.load_block(block)
        return chain

    def _program(self) -> ExportedProgram:
        try:
            return load_program(self.path / FLOAT_FILE)
        except InputError as error:
            raise InputError(error.message, hint=REPAIR) from None

    @property
    def float_module(self) -> fx.GraphModule:
        """The float network, batch norms folded."""
        return self.chain.module

    @cached_property
    def deployed_module(self) -> fx.GraphModule:
        """The deployed network as it is exported; ``IntegerSimulation`` runs it as integer hardware does."""
        from metaaug_cli.deployment.deploy import deploy

        return deploy(self.chain)

    @cached_property
    def onnx_path(self) -> Path:
        """The exported file inside the run directory; written when it is first asked for.

        Where the directory cannot be written, a temporary file, which is gone when the process ends.
        """
        path = self.path / ONNX_FILE
        if not path.exists():
            from metaaug_cli.deployment.export import export_onnx

            if not os.access(self.path, os.W_OK | os.X_OK):
                folder = tempfile.mkdtemp(prefix="metaaug-")
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
                path = Path(folder) / ONNX_FILE
            export_onnx(self.deployed_module, input_size=self.input_size, path=path, manifest=self.manifest())
        return path

    def manifest(self) -> Manifest:
        """What the exported file says about itself."""
        from metaaug_cli.prepare import method_label

        placement = self.chain.placement
        fingerprint = self.info["fingerprint"]
        return Manifest(
            model=self.info["model"],
            placement=self.recipe.quantization.placement,
            method=method_label(self.recipe),
            weight_bits={w.name: w.bits for w in placement.weights.values()},
            act_bits={a.name: a.bits for a in placement.activations.values()},
            recipe=self.recipe.model_dump(mode="json"),
            recipe_sha256=fingerprint["recipe"],
            weights_sha256=fingerprint["weights"],
            calibration_sha256=fingerprint["calibration"],
            preprocessing=self.info["preprocessing"],
            metrics=read_metrics(self.path),
        )


def load_run(run_dir: Path | str) -> Run:
    """Read a finished run.

    Raises:
        InputError: It is not a run directory, or the run is not finished.
    """
    path = Path(run_dir)
    info = read_info(path)
    if info["status"] != "complete":
        done = len(list((path / "blocks").glob("*.json")))
        raise InputError(
            f"the run in {path} is not finished: {done} of {len(info['blocks'])} blocks are done",
            hint="continue it with the same `metaaug quantize` command and --resume",
        )
    if not (path / FLOAT_FILE).exists():
        raise InputError(f"{path / FLOAT_FILE} is missing", hint=REPAIR)
    return Run(path, info, _read_recipe(path / RECIPE_FILE, info["fingerprint"]["recipe"]))


def _read_recipe(path: Path, sha256: str) -> Recipe:
    """The run's recipe; one that was edited since would describe another network than the blocks hold."""
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        raise InputError(error.message, hint=REPAIR) from None
    if recipe.sha256() != sha256:
        raise InputError(f"{path} is not the recipe this run was made with", hint=REPAIR)
    return recipe
