"""Which deltas are wanted, made, kept and dropped."""

from skerry_contract import bases
from skerry_contract.manifest import File, Golden, Manifest, Needs, Owner, Reference, Tensor, Variant
from skerry_server.core import deltas as core
from skerry_server.core.deltas import Held, Runs

BIG = 100_000


def file(path, content, size=BIG):
    return File(path=path, sha256=f"{content:0>64}", size=size)


def variant(id_, *files, runtime="onnx", model="model.onnx"):
    return Variant(
        id=id_,
        runtime=runtime,
        model=model,
        files=files,
        golden=Golden(cases="golden.jsonl"),
        needs=Needs(rss_mb=1, disk_mb=1),
    )


def bundle(version, *variants, model="gas"):
    tensor = Tensor(name="x", datatype="FP32", shape=(-1, 2))
    return Manifest(
        schema=1, model=model, version=version, created="2026-01-01T00:00:00Z", owner=Owner(name="a", contact="b"), licence="MIT",
        variants=variants, inputs=(tensor,), outputs=(tensor,), reference=Reference(n=0),
    )  # fmt: skip


OLD = bundle("1.0.0", variant("fp32", file("model.onnx", "a1"), file("golden.jsonl", "a2")))
NEW = bundle("2.0.0", variant("fp32", file("model.onnx", "b1"), file("golden.jsonl", "a2")))
MANIFESTS = {"old": OLD, "new": NEW}


def runs(digest="old", goals=("new",), devices=1, variant="fp32"):
    return Runs(digest=digest, variant=variant, goals=goals, devices=devices)


def pairs(*given, manifests=MANIFESTS, **more):
    return core.wanted(given, manifests, **more)


def test_a_file_that_changed_is_wanted_from_the_one_of_its_path_and_one_that_stayed_is_not():
    (pair,) = pairs(runs(devices=7))
    assert (pair.base[-2:], pair.target[-2:], pair.path, pair.devices) == ("a1", "b1", "model.onnx", 7)
    assert (pair.model, pair.base_version, pair.target_version, pair.target_size) == ("gas", "1.0.0", "2.0.0", BIG)


def test_devices_of_several_groups_add_up_and_the_pair_of_most_comes_first():
    other = bundle("1.5.0", variant("fp32", file("model.onnx", "c1")))
    found = pairs(runs(devices=3), runs("mid", devices=4), runs(devices=2), manifests={**MANIFESTS, "mid": other})
    assert [(pair.base[-2:], pair.devices) for pair in found] == [("a1", 5), ("c1", 4)]


def test_no_more_than_so_many_are_thought_of():
    many = {f"d{n}": bundle(f"0.{n}.0", variant("fp32", file("model.onnx", f"{n:x}"))) for n in range(20)}
    found = pairs(*(runs(f"d{n}", devices=n + 1) for n in range(20)), manifests={**many, "new": NEW}, most=5)
    assert [pair.devices for pair in found] == [20, 19, 18, 17, 16]


def test_what_is_unknown_or_runs_already_or_is_of_another_model_is_passed_over():
    other = bundle("1.0.0", variant("fp32", file("model.onnx", "d1")), model="press")
    assert pairs(runs("ghost")) == []
    assert pairs(runs(variant="ghost")) == []
    assert pairs(runs(goals=("old", "ghost"))) == []
    # A device may say that it runs anything.
    assert pairs(runs("press"), manifests={**MANIFESTS, "press": other}) == []


def test_a_variant_of_the_same_name_comes_before_one_of_the_same_runtime():
    new = bundle(
        "2.0.0", variant("int8", file("model.onnx", "e1")), variant("fp32", file("model.onnx", "e2")),
        variant("lite", file("m.tflite", "e3"), runtime="tflite", model="m.tflite"),
    )  # fmt: skip
    assert [p.target[-2:] for p in pairs(runs(), manifests={"old": OLD, "new": new})] == ["e2"]
    renamed = bundle("2.0.0", variant("float", file("net.onnx", "e4"), model="net.onnx"))
    assert [p.target[-2:] for p in pairs(runs(), manifests={"old": OLD, "new": renamed})] == ["e4"]
    lite = bundle("2.0.0", variant("lite", file("m.tflite", "e3"), runtime="tflite", model="m.tflite"))
    assert pairs(runs(), manifests={"old": OLD, "new": lite}) == []


def test_small_files_and_empty_bases_are_fetched_whole():
    held = variant("fp32", file("model.onnx", "a1"), file("labels.txt", "a2", 5000), file("none.bin", "a3", 0))
    target = variant("fp32", file("labels.txt", "b2", bases.LEAST_BYTES - 1), file("none.bin", "b3"))
    assert [bases.base_of(one, target, held) for one in target.files] == [None, None]
    enough = file("labels.txt", "b2", bases.LEAST_BYTES)
    assert bases.base_of(enough, target, held).sha256[-2:] == "a2"


def due(state, now_ms=0, program="1", **more):
    return core.is_due(Held(state=state, maker="1", **more), now_ms=now_ms, program=program)


def test_a_failure_is_tried_again_later_and_later_and_then_only_by_a_newer_program():
    assert due("waiting")
    assert not due("failed", attempts=1, now_ms=core.RETRY_MS[0] - 1)
    assert due("failed", attempts=1, now_ms=core.RETRY_MS[0])
    assert not due("failed", attempts=2, now_ms=core.RETRY_MS[0])
    assert due("failed", attempts=2, now_ms=core.RETRY_MS[1])
    assert not due("failed", attempts=core.ATTEMPTS, now_ms=1 << 60)
    assert due("failed", attempts=core.ATTEMPTS, program="2")


def test_what_saves_too_little_is_not_made_again_unless_by_a_newer_program():
    assert not due("useless", now_ms=1 << 60)
    assert due("useless", program="2")
    assert not due("ready", program="2")
    assert not due("making")
    assert core.is_worth_it(90, 100)
    assert not core.is_worth_it(91, 100)
    assert not core.is_worth_it(0, 100)


def test_what_was_cut_by_a_crash_waits_and_what_ended_the_server_each_time_failed():
    assert core.after_a_crash(Held(state="making", attempts=1))[0] == "waiting"
    state, why = core.after_a_crash(Held(state="making", attempts=core.ATTEMPTS))
    assert state == "failed"
    assert "3 times" in why


def test_unwanted_deltas_stay_a_day():
    assert not core.is_over(Held(state="ready", wanted_ms=0), now_ms=core.KEEP_MS)
    assert core.is_over(Held(state="ready", wanted_ms=0), now_ms=core.KEEP_MS + 1)


def test_room_is_made_by_what_was_wanted_longest_ago_or_not_at_all():
    sizes = {("a", "x"): (10, 300), ("b", "x"): (20, 100), ("c", "x"): (30, 200)}
    assert core.to_drop(sizes, 0) == []
    assert core.to_drop(sizes, 1) == [("b", "x")]
    assert core.to_drop(sizes, 21) == [("b", "x"), ("c", "x")]
    assert core.to_drop(sizes, 60) == [("b", "x"), ("c", "x"), ("a", "x")]
    assert core.to_drop(sizes, 61) is None
