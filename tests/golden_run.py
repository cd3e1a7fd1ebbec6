"""What the golden tests share: one small network, its images, a recipe, a progress, a run that is killed."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

from networks import SIZE, ResidualNet, images, trained

from metaaug_cli.calibration.data import make_calibration_set
from metaaug_cli.graph.capture import export_program
from metaaug_cli.networks.models import LoadedModel
from metaaug_cli.networks.preprocessing import Preprocessing
from metaaug_cli.networks.weights import hash_state
from metaaug_cli.recipe.config import Recipe

TESTS = Path(__file__).resolve().parent
PREPROCESSING = Preprocessing(SIZE[1:], None, "bilinear", (0.5,) * 3, (0.5,) * 3)
BLOCKS = ["stem.0", "layer1.0", "layer1.1", "layer2.0", "fc"]


def model(seed=0):
    network = trained(ResidualNet(), seed)
    return LoadedModel(network, "residual", PREPROCESSING, "made up", hash_state(network.state_dict()))


@cache
def exported():
    """The same network traced once: what most tests need."""
    return replace(model(), module=export_program(model().module, SIZE))


def calibration(seed=1):
    pictures = images(48, seed=seed).clamp(-1, 1)
    return make_calibration_set(pictures, PREPROCESSING, [f"{i}.png" for i in range(48)])


def recipe(*assignments):
    """Two-bit weights, and activations of so many bits that a code on a border changes no loss by 1e-4."""
    fast = ["quantization.weight_bits=2", "quantization.act_bits=8", "reconstruction.iterations=20"]
    plain = ["augmentation.kind=none", "reconstruction.batch_size=8"]
    return Recipe().override([*fast, *plain, *assignments])


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.plan, self.steps, self.blocks = None, [], []

    def planned(self, blocks, steps_per_block):
        self.plan = (blocks, steps_per_block)

    def warming_up(self, done, total):
        pass

    def warmed_up(self, warmup):
        pass

    def step(self, block, done, total):
        self.steps.append((block.name, done, total))

    def finished(self, block, history, *, resumed):
        self.blocks.append((block.name, resumed))


def block_files(run):
    """Bytes of every learned state, and the losses of every history."""
    states = {p.name: p.read_bytes() for p in (run / "blocks").glob("*.safetensors")}
    histories = {p.name: json.loads(p.read_text()) for p in (run / "blocks").glob("*.json")}
    return states, {name: without_seconds(h) for name, h in histories.items()}


def without_seconds(content):
    """A JSON object without what the clock says, at any depth of objects."""
    kept = {key: value for key, value in content.items() if key != "seconds"}
    return {key: without_seconds(v) if isinstance(v, dict) else v for key, v in kept.items()}


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import metaaug_cli.runs.artifacts as artifacts
from metaaug_cli.pipeline import quantize
from golden_run import Recorder, calibration, model, recipe

folder, point, *settings = sys.argv[2:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killer(Recorder):
    def step(self, block, done, total):
        if point in ("inside a block", "inside the augmenter's steps") and (block.index, done) == (2, 7):
            die()

if point == "between the two files of a block":
    write = artifacts.write_atomically
    def write_and_die(path, content):
        if path.name == "003-layer2.0.json":
            die()
        write(path, content)
    artifacts.write_atomically = write_and_die

run = artifacts.Path(folder)
quantize(model(), calibration(), recipe=recipe(*settings), run_dir=run, device="cpu", progress=Killer())
"""
