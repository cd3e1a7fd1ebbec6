"""The evaluation report: JSON under a published, versioned schema, and JUnit XML for CI.

The schema is generated from the dataclasses here (:func:`report_schema`). Fields may be added within a
version; removing one, renaming it or changing its meaning raises ``SCHEMA_VERSION``.
"""

import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from metaaug_cli.files import write_atomically
from metaaug_cli.verification.evaluation import Evaluation
from metaaug_cli.verification.gates import Gate
from metaaug_cli.verification.openvino_check import OpenVinoReport
from metaaug_cli.verification.parity import LayerParity, Parity

SCHEMA_VERSION: Literal[1] = 1
_SCHEMA_TITLE = "metaaug evaluation report"


@dataclass(frozen=True)
class DataSummary:
    """The images of an evaluation."""

    folder: Annotated[str, Field(description="folder as given to --data")]
    images: Annotated[int, Field(description="images used")]
    available: Annotated[int, Field(description="images in the folder")]
    labelled: Annotated[bool, Field(description="whether class folders gave labels")]
    skipped: Annotated[tuple[str, ...], Field(description="unreadable files, each with the reason")]


@dataclass(frozen=True)
class OnnxFile:
    """The ONNX file that was run."""

    path: str
    bytes: Annotated[int, Field(description="size of the file")]
    sha256: str


@dataclass(frozen=True)
class Kernels:
    """What ONNX Runtime runs after its own optimisation."""

    integer: Annotated[
        dict[str, int], Field(description="operator kind to the number of its integer kernels")
    ]
    floating: Annotated[dict[str, int], Field(description="operator kind to the number of its float kernels")]
    float_nodes: Annotated[tuple[str, ...], Field(description="the nodes left in float")]


@dataclass(frozen=True)
class ParityReport:
    """Codes of the simulation, and of the integer reference where it ran, against ONNX Runtime's."""

    images: Annotated[int, Field(description="images compared")]
    passed: bool
    verdict: Annotated[
        str, Field(description="passed, or the first layer out of tolerance and its worst case")
    ]
    simulation: Annotated[bool, Field(description="simulation within tolerance, layer by layer")]
    reference: Annotated[bool | None, Field(description="integer reference exact; null when it did not run")]
    top1_agreement: Annotated[float, Field(description="simulation against ONNX Runtime")]
    max_logit_difference: float
    logit_std: Annotated[float, Field(description="standard deviation of ONNX Runtime's logits")]
    layers: Annotated[tuple[LayerParity, ...], Field(description="one entry per activation quantizer")]


@dataclass(frozen=True)
class Report:
    """Everything `metaaug evaluate` found out."""

    schema_version: Annotated[Literal[1], Field(description="raised when a field changes its meaning")]
    target: Annotated[str, Field(description="run directory or ONNX file as given")]
    data: DataSummary
    onnx: OnnxFile
    evaluation: Annotated[Evaluation, Field(description="fractions in 0..1, drops in points")]
    parity: Annotated[ParityReport | None, Field(description="null for a bare ONNX file")]
    kernels: Kernels
    gates: Annotated[tuple[Gate, ...], Field(description="the limits that were asked for")]
    passed: Annotated[bool, Field(description="whether every gate was met")]
    versions: Annotated[dict[str, str], Field(description="Python and the libraries that took part")]
    openvino: Annotated[OpenVinoReport | None, Field(description="null without --openvino")]


def summarize_parity(parity: Parity) -> ParityReport:
    """What the report keeps of a parity check."""
    return ParityReport(
        images=parity.images,
        passed=parity.passed,
        verdict=parity.verdict(),
        simulation=parity.gate_b,
        reference=None if parity.reference_top1_agreement is None else parity.gate_a,
        top1_agreement=parity.top1_agreement,
        max_logit_difference=parity.max_logit_difference,
        logit_std=parity.logit_std,
        layers=parity.layers,
    )


def report_to_dict(report: Report) -> dict[str, Any]:
    """The report as plain values that ``json`` can write."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(report)))
    return plain


def report_schema() -> dict[str, Any]:
    """The JSON schema of the report, draft 2020-12."""
    schema = TypeAdapter(Report).json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": _SCHEMA_TITLE,
    }


def schema_text() -> str:
    """The schema as it is published in ``docs/reference/report.schema.json``."""
    return json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n"


def describe_onnx(path: Path) -> OnnxFile:
    """Size and hash of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return OnnxFile(path=str(path), bytes=path.stat().st_size, sha256=digest)


def write_junit(path: Path, gates: Sequence[Gate], *, target: str, properties: Mapping[str, object]) -> None:
    """Write the gates as JUnit XML, one test case each, atomically.

    Args:
        path: File to write.
        gates: Each becomes a test case, failed when it was missed.
        target: What was evaluated; the class name of the test cases.
        properties: Figures worth showing beside them.

    Raises:
        InputError: The file cannot be written.
    """
    failures = sum(not gate.passed for gate in gates)
    counts = {"tests": str(len(gates)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ET.Element("testsuites", {"name": "metaaug", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": "metaaug evaluate", **counts})
    listed = ET.SubElement(suite, "properties")
    for name, value in properties.items():
        ET.SubElement(listed, "property", name=name, value=_xml_text(str(value)))
    for gate in gates:
        case = ET.SubElement(suite, "testcase", classname=f"metaaug.{_plain(target)}", name=gate.name)
        if gate.passed:
            ET.SubElement(case, "system-out").text = _xml_text(gate.text)
        else:
            text = _xml_text(gate.text)
            ET.SubElement(case, "failure", message=text, type="gate").text = text
    ET.indent(root)
    write_atomically(path, ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _plain(target: str) -> str:
    """Dots separate packages in CI displays, so the name of a target must have none."""
    return _xml_text(Path(target).resolve().name.replace(".", "_")) or "target"


def _xml_text(text: str) -> str:
    """XML 1.0 has no way to write most control characters."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)
