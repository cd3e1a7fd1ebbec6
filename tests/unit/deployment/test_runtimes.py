"""The table of ONNX Runtime releases, against what was measured and against real files."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from metaaug_cli.deployment.export import export_onnx
from metaaug_cli.deployment.ort import open_session
from metaaug_cli.deployment.packing import pack
from metaaug_cli.deployment.runtimes import (
    KEEP_FLOAT_WEIGHTS,
    NEWEST,
    OLDEST,
    SUPPORT,
    WITHOUT_INTEGER_KERNELS,
    choose_pack,
    format_release,
    least_release,
    parse_release,
    require_integer,
    storage_of,
)
from metaaug_cli.errors import UsageError


@pytest.fixture(scope="module")
def measured(repository):
    """(release, key of SUPPORT) to the results of all files that store their codes so."""
    record = json.loads((repository / "benchmarks/results/runtime-matrix.json").read_text())
    found = {}
    for release, files in record["results"].items():
        for row in record["forms"]:
            form, bits = row["form"].split()[0], row["bits"][1]
            key = "8 bits" if form == "int8" or bits == "8" else f"{form} {bits} bits"
            found.setdefault((parse_release(release), key), []).append(files[row["file"]])
    return found


def test_the_table_covers_the_measured_releases(measured):
    releases = {release for release, _ in measured}
    assert (min(releases), max(releases)) == (OLDEST, NEWEST)
    assert {key for _, key in measured} == set(SUPPORT)


def test_the_table_says_what_was_measured(measured):
    for (release, key), results in measured.items():
        support, where = SUPPORT[key], f"{key} on {format_release(release)}"
        exact = all(r["loads"] and r["to_int8"]["difference"] <= 0.1 for r in results)
        assert exact == (release >= support.exact), where
        integer = exact and all(r["integer"] == r["nodes"] for r in results)
        assert integer == (support.integer is not None and release >= support.integer), where
        if integer:
            assert all(r["loads_plain"] and r["to_newest"]["difference"] <= 1e-5 for r in results), where


@pytest.mark.parametrize(
    ("bits", "mode", "storage", "least"),
    [
        ("W8A8", "packed", ["8 bits"], "1.20"),
        ("W4A4", "int8", ["8 bits"], "1.20"),
        ("W4A4", "packed", ["packed 4 bits"], "1.23"),
        ("W4A4", "native", ["native 4 bits"], "1.31"),
        ("W2A2", "packed", ["packed 2 bits"], "1.25"),
        ("W2A4", "native", ["native 4 bits", "native 2 bits"], "1.31"),
    ],
)
def test_a_file_names_the_release_it_needs(exported, bits, mode, storage, least):
    model = onnx.load(exported(bits)[1])
    packing = pack(model, mode)
    assert storage_of(model) == storage
    assert packing.least_onnxruntime == least_release(model) == least


@pytest.mark.parametrize(
    ("bits", "release", "chosen"),
    [
        ({4, 8}, (1, 22), "int8"),
        ({4, 8}, (1, 23), "packed4"),
        ({4, 8}, (1, 25), "packed"),
        ({3}, (1, 24), "packed4"),
        ({2, 4}, (1, 22), "int8"),
        ({2, 4}, (1, 24), "packed4"),
        ({2, 8}, (1, 25), "packed"),
        ({8}, (1, 31), "int8"),
        ({5, 8}, (1, 31), "int8"),
    ],
)
def test_the_smallest_form_that_runs_as_integers_is_chosen(bits, release, chosen):
    assert choose_pack(bits, release) == chosen


@pytest.mark.parametrize("few", [0, 1, 3, 7])
@pytest.mark.parametrize("release", [OLDEST, (1, 23), (1, 24), (1, 25), NEWEST])
@pytest.mark.parametrize("bits", ["W8A8", "W4A4", "W2A4", "W2A2"])
def test_the_chosen_form_runs_whatever_the_codes_are(exported, bits, release, few):
    """One layer is dead, or has codes that need fewer bits than its grid."""
    model = onnx.load(exported(bits)[1])
    codes = next(i for i in model.graph.initializer if i.name == "conv2.codes")
    codes.raw_data = np.full(len(codes.raw_data), few, np.int8).tobytes()
    mode = choose_pack({int(bits[1]), 8}, release)
    pack(model, mode)
    require_integer(model, release)
    narrow = {key for key in storage_of(model) if key != "8 bits"}
    assert bool(narrow) == (mode != "int8")


REFUSED = [
    ("W4A4", "packed", (1, 22), "cannot cast from uint4", "--pack int8"),
    ("W2A2", "packed", (1, 24), "fully run as integers from 1.25", "storage in 4 bits"),
    ("W2A2", "packed", (1, 23), "do not know the types", "leaving --pack out"),
    ("W4A4", "native", (1, 22), "compute wrong logits", "--pack int8"),
    ("W4A4", "native", (1, 30), "compute wrong logits", "--pack packed"),
    ("W2A4", "native", (1, 22), "need ONNX Runtime 1.31", "--pack int8"),
    ("W4A4", "native", (1, 31), "no integer kernels", "--pack packed"),
]


@pytest.mark.parametrize(("bits", "mode", "release", "reason", "alternative"), REFUSED)
def test_what_a_release_cannot_run_is_refused_with_what_it_can(
    exported, manifest, networks, tmp_path, bits, mode, release, reason, alternative
):
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match=reason) as error:
        export_onnx(
            exported(bits)[0],
            input_size=networks.SIZE,
            path=path,
            manifest=manifest,
            pack=mode,
            target=release,
        )
    assert error.value.exit_code == 2
    assert alternative in error.value.hint
    assert not path.exists()


@pytest.mark.parametrize("mode", ["int8", "packed", "native"])
def test_eight_bits_run_everywhere(exported, mode):
    model = onnx.load(exported("W8A8")[1])
    pack(model, mode)
    for release in (OLDEST, NEWEST, (2, 0)):
        require_integer(model, release)


def test_versions_are_read_strictly():
    assert parse_release("1.22") == parse_release(" 1.22.1 ") == (1, 22)
    assert parse_release("1.40") == (1, 40)
    for text in ("1", "latest", "1.22rc1", "", "1.19", "0.9"):
        with pytest.raises(UsageError, match="--target-ort"):
            parse_release(text)


@pytest.mark.parametrize(
    ("version", "options", "shared"),
    [
        ("1.30.0", WITHOUT_INTEGER_KERNELS, False),
        ("1.30.0", WITHOUT_INTEGER_KERNELS | KEEP_FLOAT_WEIGHTS, False),
        ("1.31.0", WITHOUT_INTEGER_KERNELS, True),
        ("1.32.0.dev20261101", WITHOUT_INTEGER_KERNELS, True),
        ("1.20.0", {}, True),
        ("1.20.0", KEEP_FLOAT_WEIGHTS, True),
    ],
)
def test_buffers_are_not_shared_where_packed_codes_would_overflow_them(
    exported, monkeypatch, version, options, shared
):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    session = open_session(exported("W4A4")[1], options=options)
    assert session.get_session_options().enable_mem_reuse is shared
