"""Golden cases on the real runtime: agreement per case, and a model that always says one class."""

import hashlib
import json

import pytest
from skerry_contract import canonical
from skerry_runtime import runner
from skerry_runtime.bundle import open_bundle
from skerry_runtime.errors import Rejected
from skerry_runtime.proof import prove, prove_batch


def loaded(folder):
    bundle = open_bundle(folder)
    return runner.load(bundle, bundle.manifest.variants[0])


def rewrite(folder, golden=None, change=lambda manifest: None):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if golden is not None:
        (folder / "golden.jsonl").write_bytes(golden)
        for file in manifest["variants"][0]["files"]:
            if file["path"] == "golden.jsonl":
                file.update(sha256=hashlib.sha256(golden).hexdigest(), size=len(golden))
    change(manifest)
    (folder / "manifest.json").write_bytes(canonical.encode(manifest))


def cases(folder):
    return [json.loads(line) for line in (folder / "golden.jsonl").read_text().splitlines()]


def lines(items):
    return "\n".join(json.dumps(item) for item in items).encode()


@pytest.mark.parametrize(
    ("kind", "transforms"),
    [("classifier", False), ("classifier", True), ("int8", False), ("int8", True), ("identity", False)],
)
def test_a_good_model_proves_itself(models, tmp_path, kind, transforms):
    models.build_bundle(tmp_path, kind=kind, transforms=transforms)
    ready = loaded(tmp_path)
    found = prove(ready)
    assert found.ok
    assert (found.cases, found.passed, found.failed) == (12, 12, 0)
    assert found.max_abs_diff < 0.1
    assert found.recall == ({} if kind == "identity" else {"class-0": 1.0, "class-1": 1.0, "class-2": 1.0})
    assert prove_batch(ready) == ""


def test_a_model_that_gives_other_numbers_fails_case_by_case(models, tmp_path):
    models.build_bundle(tmp_path, kind="wrong-golden")
    found = prove(loaded(tmp_path))
    assert not found.ok
    assert found.passed == 4  # the middle class of three stays where it was
    assert found.max_abs_diff > 0.9
    assert "case 1, probabilities: [" in found.detail


def test_a_model_that_always_says_one_class_fails_though_its_golden_outputs_agree(models, tmp_path):
    models.build_bundle(tmp_path, kind="quiet-defect")
    found = prove(loaded(tmp_path))
    assert found.passed == found.cases
    assert not found.ok
    assert found.recall == {"class-0": 1.0, "class-1": 0.0, "class-2": 0.0}
    assert "recall of 'class-1': wanted 0.8, got 0.000" in found.detail


def test_it_fails_even_when_the_bundle_asks_for_no_recall(models, tmp_path):
    models.build_bundle(tmp_path, kind="quiet-defect")
    rewrite(tmp_path, change=lambda m: m["variants"][0]["golden"].pop("minimum_recall"))
    found = prove(loaded(tmp_path))
    assert not found.ok
    assert "says 'class-0' to cases of 3 classes" in found.detail


def test_a_recall_that_no_case_can_show_fails(models, tmp_path):
    models.build_bundle(tmp_path)
    only = [case for case in cases(tmp_path) if case["label"] != "class-2"]
    rewrite(tmp_path, golden=lines(only))
    assert "class 'class-2' has a minimum recall and no labelled case" in prove(loaded(tmp_path)).detail


def test_the_tolerance_is_per_datatype_and_none_means_equal(models, tmp_path):
    models.build_bundle(tmp_path)
    moved = cases(tmp_path)
    moved[3]["outputs"][0]["data"][0] += 0.01
    rewrite(tmp_path, golden=lines(moved))
    found = prove(loaded(tmp_path))
    assert (found.passed, found.failed) == (11, 1)
    assert found.max_abs_diff == pytest.approx(0.01, abs=1e-4)
    rewrite(tmp_path, change=lambda m: m["variants"][0]["golden"].update(tolerance={"FP32": 0.02}))
    assert prove(loaded(tmp_path)).ok
    rewrite(tmp_path, change=lambda m: m["variants"][0]["golden"].pop("tolerance"))
    assert not prove(loaded(tmp_path)).ok


def test_a_label_in_text_must_be_equal(models, tmp_path):
    models.build_bundle(tmp_path, transforms=True)
    wrong = cases(tmp_path)
    wrong[0]["outputs"][1]["data"] = ["class-9"]
    rewrite(tmp_path, golden=lines(wrong))
    assert "case 1, label: [0]: wanted 'class-9', got 'class-0'" in prove(loaded(tmp_path)).detail


def test_nan_and_shape_and_datatype_must_agree_too(models, tmp_path):
    models.build_bundle(tmp_path, kind="identity")
    wrong = cases(tmp_path)
    wrong[0]["outputs"][0]["data"][0] = None
    wrong[1]["outputs"][0].update(shape=[4])
    wrong[2]["outputs"][0].update(datatype="FP64")
    wrong[3]["inputs"][0]["data"][0] = None
    wrong[4]["outputs"][0].update(name="z")
    rewrite(tmp_path, golden=lines(wrong))
    found = prove(loaded(tmp_path))
    details = [failure.detail for failure in found.failures]
    assert [failure.line for failure in found.failures] == [1, 2, 3, 4, 5]
    assert "wanted nan" in details[0]
    assert details[1] == "wanted shape [4], got [1, 4]"
    assert details[2] == "wanted FP64, got FP32"
    assert "wanted a number, got NaN" in details[3]
    assert details[4] == "the model has no such output"
    assert found.max_abs_diff == 0.0


def test_nan_that_was_expected_is_right(models, tmp_path):
    models.build_bundle(tmp_path, kind="identity")
    both = cases(tmp_path)
    both[0]["inputs"][0]["data"][0] = None
    both[0]["outputs"][0]["data"][0] = None
    rewrite(tmp_path, golden=lines(both), change=lambda m: m["features"][0].update(nullable=True))
    assert prove(loaded(tmp_path)).ok


def test_a_row_whose_answer_depends_on_its_batch_is_caught(models, tmp_path):
    # Dynamic quantization with one far row: the others lose their resolution when it stands beside them.
    models.build_bundle(tmp_path, kind="dynamic-as-int8")
    ready = loaded(tmp_path)
    assert prove(ready).ok
    assert prove_batch(ready) == ""
    x, _ = models.rows(12, draw=99)
    x[5] *= 3000
    items = cases(tmp_path)
    for i, item in enumerate(items):
        item["inputs"][0]["data"] = x[i].tolist()
        item["outputs"][0]["data"] = ready.infer({"x": x[i : i + 1]}).outputs["probabilities"].ravel().tolist()
    rewrite(tmp_path, golden=lines(items), change=lambda m: m["variants"][0]["golden"].pop("minimum_recall"))
    ready = loaded(tmp_path)
    assert prove(ready).passed == 12
    assert "12 golden cases as one batch" in prove_batch(ready)


@pytest.mark.parametrize(
    ("golden", "words"),
    [
        (b"", "wanted 1 to 10000 cases, got 0"),
        (b"\n\n", "wanted 1 to 10000 cases, got 0"),
        (b"{", "line 1: wanted JSON"),
        (b"[]", "line 1: wanted an object"),
        (b"[" * 100_000, "line 1: wanted JSON"),
        (b"\xff\xfe", "line 1: wanted JSON"),
        (b'{"inputs":[]}', "wanted outputs or a label"),
        (b'{"inputs":{},"label":"a"}', "wanted a list of inputs"),
        (b'{"inputs":[{"name":"x"}],"label":"a"}', "inputs want name, datatype, shape, data"),
        (b'{"inputs":[7],"label":"a"}', "inputs want name"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1]}],"label":"a"}', "wanted 2 for shape"),
        (b'{"inputs":[],"label":3,"outputs":[]}', "label as text"),
    ],
)
def test_cases_that_cannot_be_read_fail_the_proof_with_their_line(models, tmp_path, golden, words):
    models.build_bundle(tmp_path)
    rewrite(tmp_path, golden=golden)
    with pytest.raises(Rejected) as caught:
        prove(loaded(tmp_path))
    assert caught.value.code == "golden_failed"
    assert words in caught.value.detail
