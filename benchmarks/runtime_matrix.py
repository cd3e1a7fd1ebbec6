"""Which ONNX Runtime release runs which exported form: load, integer kernels, equal logits.

``make matrix`` installs the releases side by side under build/runtimes, exports the shipped digits network
in every form (pack x bits x weight grid), runs each file on each release in a process of its own, and writes
docs/reference/runtime-matrix.md and benchmarks/results/runtime-matrix.json. Needs a package index.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, ROOT, machine
from runtime_worker import BATCHES

from metaaug_cli.calibration.data import CalibrationSet
from metaaug_cli.demo import MEAN, STD, Digits, load_digits_split
from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.manifest import Manifest
from metaaug_cli.files import write_atomically
from metaaug_cli.networks.models import LoadedModel, load_model
from metaaug_cli.pipeline import quantize
from metaaug_cli.recipe.config import Recipe

RELEASES = [
    "1.20.1", "1.21.1", "1.22.1", "1.23.2", "1.24.4", "1.25.1",
    "1.26.0", "1.27.0", "1.28.0", "1.29.0", "1.30.0", "1.31.1",
]  # fmt: skip
BITS = ["W8A8", "W4A4", "W2A4", "W2A2"]
GRIDS = ["symmetric", "asymmetric"]
FORMS: dict[str, dict[str, Any]] = {
    "int8": {"pack": "int8"},
    "int8 --reduce-range": {"pack": "int8", "reduce_range": True},
    "packed": {"pack": "packed"},
    "native": {"pack": "native"},
}
RUNTIMES = ROOT / "build" / "runtimes"
PAGE = ROOT / "docs" / "reference" / "runtime-matrix.md"
DATA = RESULTS / "runtime-matrix.json"
_CALIBRATION_IMAGES = 128
_EQUAL, _NEAR = 1e-5, 0.1


def install(release: str) -> Path:
    """The folder of one release, installed when it is not there yet."""
    folder = RUNTIMES / f"onnxruntime-{release}"
    if not (folder / "onnxruntime").is_dir():
        print(f"installing onnxruntime {release}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"onnxruntime=={release}"], check=True)
    return folder


def export_all(folder: Path) -> list[dict[str, str]]:
    """Every form of the digits network; asymmetric 8-bit weights do not exist (they would not fit int8)."""
    train, _ = load_digits_split()
    rows = []
    for bits, grid in itertools.product(BITS, GRIDS):
        if (bits, grid) == ("W8A8", "asymmetric"):
            continue
        result = quantize(_model(), _calibration(train), recipe=_recipe(bits, grid), device="cpu")
        for form, settings in FORMS.items():
            path = folder / f"{bits}-{grid}-{form.replace(' --', '-')}.onnx"
            manifest = Manifest(model="digits_cnn", placement="integer", method="nearest")
            export_onnx(
                result.deployed, input_size=result.input_size, path=path, manifest=manifest, **settings
            )
            rows.append({"form": form, "bits": bits, "weights": grid, "file": path.name})
        print(f"exported {bits} {grid}", flush=True)
    return rows


def _model() -> LoadedModel:
    assets = ROOT / "metaaug_cli" / "assets"
    weights = assets / "digits_cnn.safetensors"
    return load_model(
        f"{assets / 'digits_cnn.py'}:digits_cnn", weights=weights, size=8, mean=(MEAN,), std=(STD,)
    )


def _calibration(digits: Digits) -> CalibrationSet:
    images = torch.from_numpy(normalized(digits)[:_CALIBRATION_IMAGES])
    names = tuple(map(str, range(len(images))))
    return CalibrationSet(images, _model().preprocessing, names, (), "0" * 64, "digits")


def normalized(digits: Digits) -> np.ndarray:
    """Images as the network takes them, (N, 1, 8, 8)."""
    return ((digits.images[:, None] / 255 - MEAN) / STD).astype(np.float32)


def _recipe(bits: str, grid: str) -> Recipe:
    symmetric = "true" if grid == "symmetric" else "false"
    return Recipe().override(
        [
            f"quantization.weight_bits={bits[1]}",
            f"quantization.act_bits={bits[3]}",
            f"quantization.weight_symmetric={symmetric}",
            "reconstruction.method=nearest",
        ]
    )


def run_release(release: str, files: Sequence[Path], images: Path, out: Path) -> dict[str, dict[str, Any]]:
    """What one release makes of each file; a file that crashes it is noted and the others go on."""
    folder = install(release)
    out.mkdir()
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("runtime_worker.py")), "--release", release]
    found: dict[str, dict[str, Any]] = {}
    while pending := [p for p in files if p.name not in found]:
        call = [*command, "--images", str(images), "--out", str(out), *map(str, pending)]
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found |= {line["file"]: line for line in lines}
        if done.returncode == 0:
            break
        if not lines and done.returncode > 0:
            raise SystemExit(f"onnxruntime {release} does not start:\n{done.stderr}")
        crashed = pending[len(lines)].name
        found[crashed] = {"file": crashed, "loads": False, "refused": f"signal {-done.returncode}"}
    return found


def compare(results: dict[str, dict[str, Any]], folder: Path, newest: str) -> None:
    """Add each file's distance from its logits on the newest release, and from the int8 form there."""
    for release, files in results.items():
        for name, result in files.items():
            if not result["loads"]:
                continue
            logits = np.load(folder / release / f"{Path(name).stem}.npy")
            int8 = "-".join(Path(name).stem.split("-")[:2]) + "-int8"
            for key, other in (("newest", Path(name).stem), ("int8", int8)):
                if not (folder / newest / f"{other}.npy").exists():
                    continue
                reference = np.load(folder / newest / f"{other}.npy")
                difference = float(np.abs(logits - reference).max() / reference.std())
                agreement = float((logits.argmax(-1) == reference.argmax(-1)).mean())
                result[f"to_{key}"] = {"difference": difference, "agreement": agreement}


def verdict(result: dict[str, Any]) -> str:
    """One word: integer, float (with its option where it needs one), wrong or refused."""
    if not result["loads"]:
        broken = result.get("loads_plain") or result["refused"].startswith("signal")
        return "fails" if broken else "refused"
    if result["to_int8"]["difference"] > _NEAR:
        return "wrong"
    if result["integer"] == result["nodes"]:
        return "integer" if result["to_newest"]["difference"] <= _EQUAL else "integer, differs"
    kind = "float" if result["integer"] == 0 else f"{result['integer']} of {result['nodes']}"
    return kind if result["loads_plain"] else f"{kind}, option"


def merged(releases: Sequence[str], columns: dict[str, tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    """Neighbouring releases that agree in every row, as one column."""
    groups = []
    for cells, members in itertools.groupby(releases, key=columns.__getitem__):
        names = [release.rpartition(".")[0] for release in members]
        groups.append((names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", cells))
    return groups


def page(record: dict[str, Any]) -> str:
    """The reference page."""
    rows, releases = record["forms"], list(record["releases"])
    found = record["results"]
    columns = {r: tuple(verdict(found[r][row["file"]]) for row in rows) for r in releases}
    groups = merged(releases, columns)
    table = [
        ["form", "bits", "weights", *(name for name, _ in groups)],
        ["---"] * (3 + len(groups)),
        *(
            [row["form"], row["bits"], row["weights"], *(cells[index] for _, cells in groups)]
            for index, row in enumerate(rows)
        ),
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return _PAGE.format(
        releases=", ".join(releases),
        table="\n".join(lines),
        parity="\n".join(_parity_lines(rows, found, releases[-1])),
        machine=record["machine"],
        images=record["images"],
        batches=", ".join(map(str, record["batches"])),
    )


def _parity_lines(
    rows: Sequence[dict[str, str]], found: dict[str, dict[str, Any]], newest: str
) -> Iterable[str]:
    yield "| form | least top-1 agreement | greatest \\|Δlogit\\| / std | and against `int8` |"
    yield "| --- | --- | --- | --- |"
    for form in FORMS:
        names = [row["file"] for row in rows if row["form"] == form]
        older = [files[name] for release, files in found.items() if release != newest for name in names]
        loaded = [result for result in older if verdict(result) not in ("refused", "fails", "wrong")]
        here = [found[newest][n] for n in names if found[newest][n]["loads"]]
        agreement = min(result["to_newest"]["agreement"] for result in loaded)
        difference = max(result["to_newest"]["difference"] for result in loaded)
        to_int8 = max(result["to_int8"]["difference"] for result in here)
        yield f"| {form} | {100 * agreement:.2f} % | {difference:.1e} | {to_int8:.1e} |"


_PAGE = """\
<!-- Generated by benchmarks/runtime_matrix.py (make matrix); edits here are lost. -->

# ONNX Runtime releases

What each release makes of each form that `metaaug export` writes, measured on the network of
`metaaug demo` (convolutions, depthwise ones among them, residual additions, a linear head; {images} images,
in batches of {batches}).

- **integer**: loads with default options; every convolution, linear layer and addition is an integer kernel
  in the graph that the release really runs, and the logits are those of the newest release.
- **14 of 15**: the same, but one node (the linear layer) runs in float.
- **float**: loads and gives the same logits (to 0.1 of their standard deviation), but computes in float.
  **option**: only with the session option that the file's manifest names, `session.disable_quant_qdq=1`. A
  network with max pools needs it at 4 bits too.
- **wrong**: loads without an error and gives other logits at some batch sizes. Releases before 1.31 may
  reuse a buffer of packed 4- or 2-bit codes for a tensor of twice the bytes and more
  (microsoft/onnxruntime#32611): `native` files corrupt memory there. **fails**: the same,
  and a run stopped with an error or the process died.
- **refused**: does not load.

`metaaug export --target-ort RELEASE` does not write a file that the release would not run as integers.

{table}

`W8A8` has symmetric weights only: a code minus its zero point must fit into int8. Its `packed` and `native`
files are the `int8` file, as there is nothing under 8 bits. Asymmetric weights carry a zero point per output
channel; `int8` and `packed` absorb it into the codes, so they run the same everywhere.

## Same numbers

Logits of every older release against the newest on the same file (but for files it refuses or gets wrong),
and of each form against `int8` on the newest:

{parity}

Measured with {releases} on {machine}.
"""


def main() -> None:
    """Install, export, run and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", default=RELEASES, help="exact versions, oldest first")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    arguments = parser.parse_args()
    if not arguments.page:
        measure(arguments.releases)
    write_atomically(PAGE, page(json.loads(DATA.read_text(encoding="utf-8"))))
    print(f"written {PAGE}")


def measure(releases: Sequence[str]) -> None:
    """Run every form on every release and keep what was found."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = export_all(folder)
        _, test = load_digits_split()
        images = normalized(test)
        np.save(folder / "images.npy", images)
        results = {}
        for release in releases:
            files = [folder / row["file"] for row in rows]
            results[release] = run_release(release, files, folder / "images.npy", folder / release)
            print(f"ran {release}", flush=True)
        compare(results, folder, releases[-1])
    record = {
        "releases": releases,
        "forms": rows,
        "results": results,
        "images": len(images),
        "batches": BATCHES,
        "machine": machine(uses_gpu=False),
    }
    RESULTS.mkdir(exist_ok=True)
    write_atomically(DATA, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
