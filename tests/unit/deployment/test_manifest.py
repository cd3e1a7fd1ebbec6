"""The manifest survives the file, and a damaged one is reported."""

import onnx
import pytest

from metaaug_cli.deployment.manifest import (
    METADATA_KEY,
    Manifest,
    package_versions,
    read_manifest,
    write_manifest,
)
from metaaug_cli.errors import InputError


def make_model(**metadata):
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def test_round_trip_through_bytes(manifest):
    model = make_model(other="kept")
    write_manifest(model, manifest)
    again = onnx.ModelProto.FromString(model.SerializeToString())
    assert read_manifest(again) == manifest
    assert {entry.key for entry in again.metadata_props} == {"other", METADATA_KEY}


def test_writing_again_replaces(manifest):
    model = make_model()
    write_manifest(model, manifest)
    write_manifest(model, manifest.model_copy(update={"method": "genie"}))
    assert len(model.metadata_props) == 1
    assert read_manifest(model).method == "genie"


def test_files_of_other_tools_have_none():
    assert read_manifest(make_model(author="someone")) is None


def test_fields_of_later_versions_are_ignored(manifest):
    text = manifest.model_dump_json()[:-1] + ', "invented_later": 1}'
    assert read_manifest(make_model(**{METADATA_KEY: text})) == manifest


@pytest.mark.parametrize("text", ["{", "{}", '{"model": "m", "placement": "nowhere", "method": "x"}'])
def test_damage_is_named(text):
    with pytest.raises(InputError, match="manifest") as caught:
        read_manifest(make_model(**{METADATA_KEY: text}))
    assert "export" in caught.value.hint


def test_versions_name_the_libraries_that_matter():
    assert {"python", "metaaug", "torch", "onnx", "onnxruntime"} <= package_versions().keys()
    assert Manifest(model="m", placement="academic", method="qdrop").versions == package_versions()
