"""A user's file runs as it would by itself, and leaves the process as it was."""

import os
import sys
import textwrap

import pytest
import torch
from user_code import FLAGS

from metaaug_cli.errors import GraphError, InputError, UsageError
from metaaug_cli.graph.capture import capture
from metaaug_cli.networks.models import load_model

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.ones(1))
        self.shift = torch.zeros(1)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) * self.scale + self.shift

def trained():
    net = Net()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.5)
    return net
"""


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def project(tmp_path):
    """A folder with a network module whose name no other test has."""
    name = f"layers_{tmp_path.name.replace('-', '_')}"
    return write(tmp_path / "project", **{name: NETWORK}), name


def noting_its_runs(folder, text):
    """The code with a line that adds a letter to the file ``runs``."""
    return f"{text}\nwith open({str(folder / 'runs')!r}, 'a') as file:\n    file.write('x')\n"


def learnable(module):
    """Whether the network gives what training through it needs."""
    image = torch.zeros(1, 3, 8, 8, requires_grad=True)
    module(image).sum().backward()
    return image.grad is not None


@pytest.mark.parametrize(
    "text",
    [
        "torch.set_grad_enabled(False)\nbuild = trained",
        "@torch.inference_mode()\ndef build():\n    return trained()",
        "torch.set_default_device('meta')\ndef build():\n    with torch.device('cpu'): return trained()",
        "torch.set_default_dtype(torch.float64)\nbuild = trained",
        "def build():\n    torch.set_default_dtype(torch.float16)\n    return trained()",
        "import os\nos.chdir('/')\nbuild = trained",
    ],
    ids=["no gradients", "inference mode", "meta device", "float64", "float16", "chdir"],
)
def test_what_a_file_changes_for_everybody_is_put_back(project, text, monkeypatch):
    folder, name = project
    monkeypatch.chdir(folder)
    write(folder, net=f"import torch\nfrom {name} import trained\n{text}\n")
    loaded = load_model("net.py:build", **FLAGS)
    assert os.getcwd() == str(folder)
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    assert torch.is_grad_enabled()
    assert learnable(loaded.module)
    assert learnable(capture(loaded.module, (3, 8, 8)))


REGISTRY = """
KNOWN = {}

def register(factory):
    if factory.__name__ in KNOWN:
        raise KeyError(f"{factory.__name__} is already registered")
    KNOWN[factory.__name__] = factory
    return factory
"""


@pytest.mark.parametrize("at_import", ["", "SPARE = Net()"], ids=["plain", "draws random numbers"])
def test_a_factory_may_be_registered(project, at_import):
    folder, name = project
    write(folder, **{f"registry_{name}": REGISTRY})
    write(
        folder,
        net=f"""
        from {name} import Net, trained
        from registry_{name} import register
        {at_import}

        @register
        def build():
            return trained()
        """,
    )
    assert load_model(f"{folder}/net.py:build", **FLAGS).module.conv.bias[0] == 0.5
    assert "build" in sys.modules[f"registry_{name}"].KNOWN


@pytest.mark.parametrize(
    "text",
    [
        "build = Net()",
        "NET = Net()\ndef build():\n    return NET",
        "STATE = Net().state_dict()\ndef build():\n    n = Net()\n    n.load_state_dict(STATE)\n    return n",
        "import functools\n@functools.cache\ndef build():\n    return Net()",
    ],
    ids=["module object", "returned object", "state", "cached"],
)
def test_random_weights_made_outside_the_factory_are_seen(project, text):
    folder, name = project
    write(folder, net=f"from {name} import Net\n{text}\n")
    with pytest.raises(UsageError, match="randomly initialised"):
        load_model(f"{folder}/net.py:build", **FLAGS)


@pytest.mark.parametrize(
    ("change", "factor"),
    [("NET.register_forward_hook(lambda *a: a[2] * 10)", 10), ("NET.conv.weight.data *= 2", 2)],
    ids=["hook", "weights"],
)
def test_a_factory_that_changes_its_modules_network_changes_it_once(project, change, factor):
    folder, name = project
    write(
        folder,
        plain=f"from {name} import trained as build\n",
        net=f"from {name} import trained\nNET = trained()\nNET.conv.bias.data.zero_()\n"
        f"def build():\n    {change}\n    return NET\n",
    )
    plain, changed = (load_model(f"{folder}/{file}.py:build", **FLAGS).module for file in ("plain", "net"))
    plain.conv.bias.data.zero_()
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(changed(image), factor * plain(image))


def test_a_neighbour_that_can_be_executed_once_only_is_no_reason_to_refuse(project):
    folder, name = project
    write(folder, **{f"registry_{name}": REGISTRY})
    write(
        folder, **{f"user_{name}": f"from registry_{name} import register\n@register\ndef a():\n    pass\n"}
    )
    write(
        folder,
        net=f"import torch\nimport user_{name}\ntorch.manual_seed(3)\nfrom {name} import trained as build\n",
    )
    assert load_model(f"{folder}/net.py:build", **FLAGS).module.conv.bias[0] == 0.5


def test_forward_may_import_neighbours_and_the_path_is_left_alone(project):
    folder, name = project
    write(folder, **{f"late_{name}": "def scale(x):\n    return x * 2\n"})
    write(
        folder,
        net=f"""
        from {name} import Net, trained

        class Late(Net):
            def forward(self, x):
                from late_{name} import scale
                return scale(super().forward(x))

        def build():
            net = Late()
            net.load_state_dict(trained().state_dict())
            return net
        """,
    )
    path = list(sys.path)
    loaded = load_model(f"{folder}/net.py:build", **FLAGS)
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(capture(loaded.module, (3, 8, 8))(image), loaded.module(image), atol=1e-5)
        with pytest.raises(RuntimeError):
            loaded.module(torch.zeros(1, 5, 8, 8))
    assert sys.path == path


@pytest.mark.parametrize("marked", [True, False], ids=["package", "plain folder"])
def test_relative_imports(project, marked):
    folder, name = project
    package = write(folder / f"pkg_{name}", layers=NETWORK)
    inner = write(package / "nets", net=noting_its_runs(folder, "from ..layers import trained as build"))
    if marked:
        # The package imports the network too; that must not execute it twice.
        write(package, __init__="from .nets.net import build\n")
        write(inner, __init__="")
    assert load_model(f"{inner}/net.py:build", **FLAGS).module.conv.bias[0] == 0.5
    assert (folder / "runs").read_text() == "xx"  # once more with another seed


@pytest.mark.parametrize("file", ["net", "net.v2"])
def test_a_file_that_falls_back_to_plain_imports_or_has_dots_in_its_name(project, file):
    folder, name = project
    package = write(folder / f"pkg_{name}", layers=NETWORK, __init__="import not_installed_anywhere\n")
    (package / f"{file}.py").write_text(
        "try:\n    from .layers import trained as build\n"
        "except ImportError:\n    from layers import trained as build\n"
    )
    assert load_model(f"{package}/{file}.py:build", **FLAGS).module.conv.bias[0] == 0.5
    other = write(folder / f"other_{name}", layers=NETWORK)
    (other / f"{file}.py").write_text("from .layers import trained as build\n")
    assert load_model(f"{other}/{file}.py:build", **FLAGS).module.conv.bias[0] == 0.5
    sys.modules.pop("layers", None)


def test_relative_imports_in_a_folder_named_like_another_module(project):
    folder, _ = project
    package = write(folder / "code", layers=NETWORK, net="from .layers import trained as build\n")
    before = sys.modules.get("code")
    assert load_model(f"{package}/net.py:build", **FLAGS).module.conv.bias[0] == 0.5
    assert sys.modules.get("code") is before


def test_relative_imports_that_lead_nowhere(project):
    folder, _ = project
    write(folder, net="x = 1\nfrom .absent import build\n")
    with pytest.raises(InputError, match=r"raised ModuleNotFoundError \(line 2\)"):
        load_model(f"{folder}/net.py:build", **FLAGS)


@pytest.mark.parametrize(
    "method",
    [
        "def train(self, mode=True):\n        super().train(mode)",
        "def state_dict(self, *a, **k):\n        return {'extra': 1, **super().state_dict(*a, **k)}",
    ],
    ids=["train returns nothing", "plain entry in state_dict"],
)
def test_methods_of_modules_that_are_written_loosely(project, method):
    folder, name = project
    write(folder, net=f"from {name} import Net, trained\n")
    with (folder / "net.py").open("a") as file:
        file.write(f"class Loose(Net):\n    {method}\n")
        file.write("def build():\n    net = Loose()\n    net.conv = trained().conv\n    return net\n")
    loaded = load_model(f"{folder}/net.py:build", **FLAGS)
    assert not loaded.module.training
    torch.save(loaded.module.state_dict(), folder / "net.pt")
    again = load_model(f"{folder}/net.py:build", weights=folder / "net.pt", **FLAGS)
    assert again.weights_sha256 == loaded.weights_sha256


def test_a_network_that_returns_an_object_of_its_own_is_told_to_return_logits(project):
    folder, name = project
    write(
        folder,
        net=f"""
        from dataclasses import dataclass
        from {name} import Net

        @dataclass
        class Output:
            logits: object

        class Wrapped(Net):
            def forward(self, x):
                return Output(super().forward(x))
        """,
    )
    loaded = load_model(f"{folder}/net.py:Wrapped", weights="random", **FLAGS)
    with pytest.raises(GraphError, match="returns an object of type Output") as caught:
        capture(loaded.module, (3, 8, 8))
    assert "returns the logits alone" in caught.value.hint
