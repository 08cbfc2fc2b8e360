"""The manifest: one refusal per rule, each named where it is broken."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import canonical, manifest
from skerry_contract.errors import ContractError, Malformed, UnsupportedVersion

from tests.golden import values as golden

GOOD = json.loads(manifest.encode(golden.MANIFEST))
Change = Callable[[dict], object]


def parse(change: Change) -> manifest.Manifest:
    value = copy.deepcopy(GOOD)
    change(value)
    return manifest.parse(canonical.encode(value))


def variant(**fields: object) -> Change:
    return lambda value: value["variants"][0].update(fields)


def golden_part(**fields: object) -> Change:
    return lambda value: value["variants"][0]["golden"].update(fields)


def feature(**fields: object) -> Change:
    return lambda value: value["features"][0].update(fields)


def file(**fields: object) -> Change:
    return lambda value: value["variants"][0]["files"][0].update(fields)


def without(path: str) -> Change:
    def change(value: dict) -> None:
        *folders, last = path.split(".")
        at = value
        for folder in folders:
            at = at[int(folder)] if isinstance(at, list) else at[folder]
        del at[last]

    return change


STATE = {"input": "h", "output": "hn", "datatype": "FP32", "shape": [2, 1, 128]}


def streams(**fields: object) -> Change:
    return lambda v: v.update(streams=fields)


def explanations(**fields: object) -> Change:
    return lambda v: v.update(explanations=fields)


REFUSALS: dict[str, tuple[Change, str]] = {
    "no schema": (without("schema"), "schema"),
    "schema 0": (lambda v: v.update(schema=0), r"\$\.schema"),
    "schema as text": (lambda v: v.update(schema="1"), r"\$\.schema"),
    "no model": (without("model"), "model"),
    "model out of the grammar": (lambda v: v.update(model="Gas Sensor"), "model"),
    "version out of the grammar": (lambda v: v.update(version="1.1"), "version"),
    "no owner": (without("owner"), "owner"),
    "owner without contact": (without("owner.contact"), r"\$\.owner: wanted `contact`"),
    "no licence": (without("licence"), "licence"),
    "no reference": (without("reference"), "reference"),
    "no variant": (lambda v: v.update(variants=[]), r"\$\.variants: wanted at least one"),
    "two variants of one id": (
        lambda v: v["variants"].append(v["variants"][0]),
        r"\$\.variants: wanted each name once",
    ),
    "variant id out of the grammar": (variant(id="ONNX"), "variant"),
    "unknown runtime": (variant(runtime="torch"), r"\$\.variants\[0\]\.runtime"),
    "unknown precision": (variant(precision="int4"), r"\$\.variants\[0\]\.precision"),
    "no inputs": (lambda v: v.update(inputs=[]), r"\$\.inputs: wanted at least one"),
    "no outputs": (lambda v: v.update(outputs=[]), r"\$\.outputs: wanted at least one"),
    "two inputs of one name": (lambda v: v["inputs"].append(v["inputs"][0]), r"\$\.inputs: wanted each name once"),
    "unknown datatype": (lambda v: v["inputs"][0].update(datatype="FLOAT"), "datatype"),
    "dimension of 0": (lambda v: v["inputs"][0].update(shape=[-1, 0]), r"\$\.inputs\[0\]\.shape"),
    "dimension of -2": (lambda v: v["outputs"][0].update(shape=[-2]), r"\$\.outputs\[0\]\.shape"),
    "no files": (variant(files=[]), r"\$\.variants\[0\]\.files: wanted at least one"),
    "a file twice": (lambda v: v["variants"][0]["files"].append(v["variants"][0]["files"][0]), "wanted each name once"),
    "a path that climbs": (file(path="../model.onnx"), "bundle path"),
    "an absolute path": (file(path="/model.onnx"), "bundle path"),
    "the manifest as a file": (file(path="manifest.json"), r"wanted names but manifest\.json"),
    "the signature as a file": (file(path="model.sig"), r"wanted names but manifest\.json"),
    "a file below the manifest": (file(path="manifest.json/x"), r"wanted names but manifest\.json"),
    "a file below a file": (
        lambda v: v["variants"][0]["files"].append({"path": "model.onnx/x", "sha256": "0" * 64, "size": 1}),
        r"model\.onnx/x lies below another file",
    ),
    "a sha256 in capitals": (file(sha256="AB" * 32), r"\$\.variants\[0\]\.files"),
    "a negative size": (file(size=-1), r"\$\.variants\[0\]\.files: .* got -1$"),
    "a size past 1 TiB": (file(size=(1 << 40) + 1), r"\$\.variants\[0\]\.files: .* got 1099511627777$"),
    "a model that is no file": (variant(model="other.onnx"), r"\$\.variants\[0\]\.model"),
    "golden cases that are no file": (golden_part(cases="other.jsonl"), r"\$\.variants\[0\]\.golden\.cases"),
    "tolerance of an unknown datatype": (
        golden_part(tolerance={"FLOAT": 0.1}),
        r"golden\.tolerance: wanted datatypes .*BYTES.*, got 'FLOAT'",
    ),
    "a negative tolerance": (golden_part(tolerance={"FP32": -0.1}), r"golden\.tolerance: FP32"),
    "a recall above 1": (golden_part(minimum_recall={"ethanol": 1.1}), r"golden\.minimum_recall: ethanol"),
    "no golden": (without("variants.0.golden"), "golden"),
    "no memory": (variant(needs={"rss_mb": 0, "disk_mb": 1}), r"\$\.variants\[0\]\.needs"),
    "negative disk": (variant(needs={"rss_mb": 1, "disk_mb": -1}), r"\$\.variants\[0\]\.needs"),
    "two features of one name": (
        lambda v: v["features"].append(v["features"][0]),
        r"\$\.features: wanted each name once",
    ),
    "a feature of no input": (feature(input="y"), r"\$\.features\[0\]: input: wanted one of .*, got 'y'"),
    "a column outside": (feature(column=2), r"\$\.features\[0\]: column: .*, got 2"),
    "a negative column": (feature(column=-1), r"\$\.features\[0\]: column: .*, got -1"),
    "edges that do not ascend": (feature(edges=[1.0, 1.0]), r"\$\.features\[0\]\.edges"),
    "more than 255 edges": (feature(edges=[float(i) for i in range(256)]), r"\$\.features\[0\]\.edges"),
    "a scale of 0": (feature(scale=0.0), r"\$\.features\[0\]\.scale"),
    "a range upside down": (feature(range=[5.0, 1.0]), r"\$\.features\[0\]\.range"),
    "a negative time to live": (feature(ttl_s=-1.0), r"\$\.features\[0\]\.ttl_s"),
    "reference on other bins": (feature(edges=[0.0]), r"\$\.reference\.features\.s1: wanted 2 counts"),
    "a slice of no feature": (lambda v: v["slices"][0].update(feature="s9"), r"\$\.slices: high"),
    "an empty slice": (lambda v: v["slices"][0].update(low=10.0), r"\$\.slices: high"),
    "an unknown policy": (feature(on_null="guess"), r"\$\.features\[0\]\.on_null"),
    "impute without a value": (feature(on_null="impute"), r"\$\.features\[0\]\.on_null: impute wants a value"),
    "fallback without a model": (feature(on_outside="fallback"), r"on_outside: fallback wants \$\.fallback"),
    "a policy that no ability names": (feature(on_stale="reject"), r"\$\.requires: wanted guards named"),
    "a model as its own fallback": (lambda v: v.update(fallback=v["model"]), r"\$\.fallback"),
    "streams without state or steps": (
        lambda v: (streams()(v), v.pop("transforms")),
        r"\$\.streams: wanted states, or internal",
    ),
    "streams with both kinds": (streams(states=[STATE], internal=True), r"\$\.streams: wanted states, or internal"),
    "streams that no ability names": (streams(states=[STATE]), r"\$\.requires: wanted states named"),
    "a state of no fixed shape": (streams(states=[STATE | {"shape": [-1]}]), r"\$\.streams\.states: h"),
    "a state of text": (streams(states=[STATE | {"datatype": "BYTES"}]), r"\$\.streams\.states: h"),
    "a state past its limit": (streams(states=[STATE | {"shape": [1 << 21]}]), r"\$\.streams\.states: h"),
    "a state twice": (streams(states=[STATE, STATE]), r"\$\.streams\.states: wanted each name once"),
    "no stream": (streams(internal=True, most=0), r"\$\.streams\.most"),
    "streams that end at once": (streams(internal=True, idle_s=0.0), r"\$\.streams\.idle_s"),
    "a share above 1": (explanations(share=1.5), r"\$\.explanations\.share"),
    "a share of nothing": (explanations(share=0.1), r"\$\.explanations\.medians: .*of the features to explain"),
    "an audit of nothing": (
        explanations(audit=["ammonia"]),
        r"\$\.explanations\.medians: .*of the features to explain",
    ),
    "a median of no feature": (explanations(medians={"s9": 1.0}), r"\$\.explanations\.medians"),
    "an audit of no class": (explanations(audit=["gold"]), r"\$\.explanations\.audit"),
}


@pytest.mark.parametrize(
    "change",
    [
        lambda v: (feature(on_null="impute", impute=1.5)(v), v.update(requires=["guards"])),
        lambda v: (feature(on_stale="fallback")(v), v.update(requires=["guards"], fallback="spare")),
        lambda v: (streams(states=[STATE])(v), v.update(requires=["states"])),
        lambda v: (streams(internal=True, most=3)(v), v.update(requires=["states"])),
        lambda v: (streams(most=3)(v), v.update(requires=["states"])),
        explanations(share=0.01, medians={"s1": 0.5}),
        lambda v: v.update(isolate=True),
    ],
)
def test_what_came_after_the_first_release_is_read_and_named_where_an_older_agent_must_not_run_it(
    change: Change,
) -> None:
    assert parse(change) != golden.MANIFEST


def test_the_base_of_the_refusals_is_accepted() -> None:
    assert parse(lambda value: None) == golden.MANIFEST


@pytest.mark.parametrize(("change", "named"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_broken_rule_is_refused_and_named(change: Change, named: str) -> None:
    with pytest.raises(Malformed, match=named):
        parse(change)


def test_one_file_of_two_variants_must_be_the_same_file() -> None:
    def change(value: dict, **fields: object) -> None:
        other = copy.deepcopy(value["variants"][0]) | {"id": "onnx-fp32"}
        other["files"][0].update(fields)
        value["variants"].append(other)

    assert len(parse(change).files()) == 2
    with pytest.raises(Malformed, match=r"model\.onnx is listed twice and differs"):
        parse(lambda value: change(value, size=1))


def test_a_file_of_one_variant_may_not_lie_below_a_file_of_another() -> None:
    def change(value: dict) -> None:
        other = copy.deepcopy(value["variants"][0]) | {"id": "onnx-fp32", "model": "model.onnx/weights"}
        other["files"][0]["path"] = "model.onnx/weights"
        value["variants"].append(other)

    with pytest.raises(Malformed, match=r"model\.onnx/weights lies below another file"):
        parse(change)


def test_a_newer_schema_is_told_from_a_broken_one() -> None:
    with pytest.raises(UnsupportedVersion, match="schema 2 is newer than 1"):
        parse(lambda value: value.update(schema=2))


def test_unknown_fields_are_kept_in_the_identity() -> None:
    value = GOOD | {"carbon_g": 12}
    data = canonical.encode(value)
    assert manifest.parse(data) == golden.MANIFEST
    assert manifest.digest(data) != manifest.digest(canonical.encode(GOOD))


def test_a_manifest_past_its_limit_is_refused() -> None:
    with pytest.raises(Malformed, match=r"at most 1048576 bytes"):
        parse(lambda value: value.update(card="x" * manifest.MAX_BYTES))


def test_a_variant_is_found_by_its_id() -> None:
    assert golden.MANIFEST.variant("onnx-int8") is golden.MANIFEST.variants[0]
    with pytest.raises(KeyError):
        golden.MANIFEST.variant("tflite-int8")


def test_what_a_reader_refuses_is_not_written() -> None:
    bad = json.loads(json.dumps(GOOD)) | {"model": "Gas"}
    with pytest.raises(Malformed):
        manifest.encode(bad)  # type: ignore[arg-type]


@given(st.data())
def test_any_part_replaced_by_anything_is_accepted_or_refused_but_never_an_accident(data: st.DataObject) -> None:
    value = copy.deepcopy(GOOD)
    at: dict | list = value
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else list(range(len(at)))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
        | st.just([])
    )
    try:
        manifest.parse(canonical.encode(value))
    except ContractError:
        pass


def test_what_goes_after_a_version_names_a_lower_one_and_asks_for_agents_that_know_it() -> None:
    found = parse(lambda value: value.update(after="1.0.0", requires=["after"]))
    assert found.after == "1.0.0"
    for fields, where in (
        ({"after": "1.0.0"}, r"\$\.requires"),
        ({"after": GOOD["version"], "requires": ["after"]}, r"\$\.after"),
        ({"after": "9.0.0", "requires": ["after"]}, r"\$\.after"),
    ):
        with pytest.raises(Malformed, match=where):
            parse(lambda value, fields=fields: value.update(fields))
    with pytest.raises(ContractError):
        parse(lambda value: value.update(after="one", requires=["after"]))
