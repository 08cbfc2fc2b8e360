"""The checks of the acceptance suite. Each asks through a client and asserts on what comes back; the models are the suite's:

``gas``, a float classifier of four features; ``echo`` and ``cube``, which give back 13 tensors, one of each datatype, three
wide and two by two; ``wide``, which gives back 1,024 floats a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.integration.worker.clients import asking as a

VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False, True, True],
    "UINT8": [0, 255, 7, 1],
    "UINT16": [0, 65535, 7, 1],
    "UINT32": [0, 2**32 - 1, 7, 1],
    "UINT64": [0, 2**64 - 1, 7, 2**53 + 1],
    "INT8": [-128, 127, 7, 1],
    "INT16": [-(2**15), 2**15 - 1, 7, 1],
    "INT32": [-(2**31), 2**31 - 1, 7, 1],
    "INT64": [-(2**63), 2**63 - 1, 7, -(2**53) - 1],
    "FP16": [-65504.0, 6e-8, 0.1, 1.0],
    "FP32": [-3.4e38, 1e-45, 0.1, 1.0],
    "FP64": [-1.7e308, 5e-324, 0.1, 1.0],
    "BYTES": ["", "grüße", "a\0b", ""],
}


def inputs_of(rows: int, *shape: int, without: tuple[str, ...] = ()) -> dict[str, a.Array]:
    """A tensor of each datatype; empty texts, greatest, smallest and subnormal numbers among the values."""
    found = {}
    for name, values in VALUES.items():
        size = rows * int(np.prod(shape))
        found[f"in_{name}"] = np.array((values * size)[:size], a.DATATYPES[name]).reshape(rows, *shape)
    return found


def same(found: dict[str, a.Array], given: dict[str, a.Array], names: list[str]) -> None:
    assert sorted(found) == sorted(f"out_{name}" for name in names), sorted(found)
    for name in names:
        back, sent = found[f"out_{name}"], given[f"in_{name}"]
        assert back.shape == sent.shape, (name, back.shape)
        if name == "BYTES":
            texts = [v.decode() if isinstance(v, bytes) else v for v in back.ravel()]
            assert texts == sent.ravel().tolist(), texts
        else:
            assert back.dtype == sent.dtype, (name, back.dtype)
            np.testing.assert_array_equal(back, sent, err_msg=name)


def refused(act: Callable[[], Any]) -> str:
    """What the client says to a refusal."""
    try:
        act()
    except Exception as error:
        return str(error)
    raise AssertionError("not refused")


def gas(rows: int = 1, **how: Any) -> a.Asked:
    x = np.linspace(-1, 1, rows * 4, dtype=np.float32).reshape(rows, 4)
    return a.Asked("gas", {"x": x}, **how)


def health_and_metadata(client: a.Client) -> None:
    assert client.live()
    assert client.ready()
    assert client.model_ready("gas")
    assert not client.model_ready("nobody")
    told = client.metadata("gas")
    assert (told["name"], told["versions"], told["platform"]) == ("gas", ["1.0.0"], "onnx_onnxv1")
    assert told["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert told["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}]


def every_datatype_in_binary(client: a.Client) -> None:
    given = inputs_of(1, 3)
    answer = client.infer(a.Asked("echo", given))
    same(answer.outputs, given, list(VALUES))


def every_datatype_in_json(client: a.Client) -> None:
    # Neither client sends half precision in JSON, nor takes it: binary both ways for that one tensor is checked above.
    given = inputs_of(1, 3)
    mixed = {name: array for name, array in given.items() if name != "in_FP16"}
    answer = client.infer(a.Asked("plain", mixed, [f"out_{n}" for n in VALUES if n != "FP16"], False, False))
    same(answer.outputs, given, [name for name in VALUES if name != "FP16"])


def binary_in_and_json_out_and_the_other_way_round(client: a.Client) -> None:
    names = [name for name in VALUES if name != "FP16"]
    given = {name: array for name, array in inputs_of(2, 3).items() if name != "in_FP16"}
    for binary_in in (True, False):
        outputs = [f"out_{name}" for name in names]
        answer = client.infer(a.Asked("plain", given, outputs, binary_in, not binary_in))
        same(answer.outputs, given, names)


def several_dimensions_and_batches(client: a.Client) -> None:
    for rows in (1, 2, 5):
        given = inputs_of(rows, 2, 2)
        same(client.infer(a.Asked("cube", given)).outputs, given, list(VALUES))


def named_outputs_come_alone(client: a.Client) -> None:
    given = inputs_of(1, 3)
    answer = client.infer(a.Asked("echo", given, ["out_BYTES", "out_FP16"]))
    same(answer.outputs, given, ["BYTES", "FP16"])


def batches_are_answered_row_by_row(client: a.Client) -> None:
    all_at_once = client.infer(gas(64)).outputs["probabilities"]
    x = gas(64).inputs["x"]
    for i in range(0, 64, 9):
        alone = client.infer(a.Asked("gas", {"x": x[i : i + 1]})).outputs["probabilities"]
        np.testing.assert_allclose(alone[0], all_at_once[i], rtol=1e-5)


def the_id_comes_back(client: a.Client) -> None:
    assert client.infer(gas(id="a-request-of-mine")).id == "a-request-of-mine"


def errors_say_what_is_wrong_and_the_connection_goes_on(client: a.Client) -> None:
    three = np.zeros((1, 3), np.float32)
    for asked, words in (
        (a.Asked("gas", {"x": three}), ["x", "[-1, 4]", "[1, 3]"]),
        (a.Asked("gas", {"x": three}, binary_in=False), ["x", "[-1, 4]", "[1, 3]"]),
        (a.Asked("gas", {"y": np.zeros((1, 4), np.float32)}), ["y", "unknown input"]),
        (a.Asked("gas", {"x": np.zeros((1, 4), np.int64)}), ["x", "INT64", "FP32"]),
        (a.Asked("gas", {"x": np.full((1, 4), np.nan, np.float32)}), ["x", "NaN"]),
        (gas(outputs=["nothing"]), ["nothing", "one of probabilities"]),
        (a.Asked("nobody", {"x": three}), ["no such model: nobody"]),
    ):
        said = refused(lambda asked=asked: client.infer(asked))
        for word in words:
            assert word in said, (words, said)
        assert client.infer(gas()).outputs["probabilities"].shape == (1, 3)


def eight_at_once_get_each_their_own_answer(client: a.Client) -> None:
    asked = [a.Asked("wide", {"x": np.full((1, 1024), i, np.float32)}, id=f"n{i}") for i in range(200)]
    answers = client.many(asked, 8)
    assert [answer.id for answer in answers] == [f"n{i}" for i in range(200)]
    for i, answer in enumerate(answers):
        assert (answer.outputs["y"] == i).all(), i


def a_thousand_requests_on_one_connection(client: a.Client) -> None:
    client.infer(gas())
    before = a.connections()
    assert before, "connections are not counted"
    for i in range(1000):
        answer = client.infer(gas(1 + i % 3, binary_in=i % 2 == 0, outputs=["probabilities"], binary_out=i % 5 != 0))
        assert answer.outputs["probabilities"].shape == (1 + i % 3, 3)
    assert a.connections() == before, f"{a.connections() - before} connections more"


def large_answers_are_whole_packed_or_not(client: a.Client) -> None:
    for rows in (1, 40, 400):
        x = (np.arange(rows * 1024) % 97).astype(np.float32).reshape(rows, 1024)
        for binary in (True, False):
            answer = client.infer(a.Asked("wide", {"x": x}, ["y"], binary, binary))
            np.testing.assert_array_equal(answer.outputs["y"], x)
            if answer.headers:
                packed = answer.headers.get("content-encoding", "")
                assert packed == ("gzip" if rows > 1 else ""), (rows, binary, packed)


def several_models_answer_at_once(client: a.Client) -> None:
    wide = np.ones((1, 1024), np.float32)
    asked = [gas(id="g") if i % 2 else a.Asked("wide", {"x": wide}, id="w") for i in range(60)]
    answers = client.many(asked, 6)
    assert [set(answer.outputs) for answer in answers] == [{"probabilities"} if i % 2 else {"y"} for i in range(60)]


# --- what only tritonclient has calls for -----------------------------------------------------------------------------


def the_index_lists_every_model(client: Any) -> None:
    assert {"model_repository", "statistics", "binary_tensor_data"} <= set(client.extensions())
    found = client.index()
    assert sorted(one["name"] for one in found) == ["cube", "echo", "gas", "plain", "wide"]
    assert all((one["state"], one["version"], one["reason"]) == ("READY", "1.0.0", "") for one in found)


def loading_is_refused_with_the_reason(client: Any) -> None:
    assert "rollouts" in refused(lambda: client.load("gas"))


def statistics_add_up(client: Any) -> None:
    def of() -> dict[str, Any]:
        (one,) = client.statistics("gas")["model_stats"]
        assert one["name"] == "gas"
        return dict(one)

    before = of()
    for rows in (1, 5, 64):
        client.infer(gas(rows))
    refused(lambda: client.infer(a.Asked("gas", {"x": np.zeros((1, 3), np.float32)})))
    after = of()
    assert after["inference_count"] - before["inference_count"] == 70
    assert after["execution_count"] - before["execution_count"] == 3
    now, then = after["inference_stats"], before["inference_stats"]
    assert now["success"]["count"] - then["success"]["count"] == 3
    assert now["fail"]["count"] - then["fail"]["count"] == 1
    assert now["fail"]["ns"] > then["fail"]["ns"]
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert sum(now[part]["ns"] for part in parts) == now["success"]["ns"]
    assert after["last_inference"] >= before["last_inference"] > 1_600_000_000_000
    everything = client.statistics()["model_stats"]
    assert sorted(one["name"] for one in everything) == ["cube", "echo", "gas", "plain", "wide"]
    assert client.statistics("gas", "1.0.0")["model_stats"][0] == of()


def a_version_may_be_named(client: Any) -> None:
    assert client.infer_version(gas(), "1.0.0").outputs["probabilities"].shape == (1, 3)
    assert "no such version: 9.9.9" in refused(lambda: client.infer_version(gas(), "9.9.9"))


def requests_and_answers_may_be_packed(client: Any) -> None:
    x = (np.arange(200 * 1024) % 97).astype(np.float32).reshape(200, 1024)
    for request in (None, "gzip", "deflate"):
        for response in (None, "gzip", "deflate"):
            for binary in (True, False):
                asked = a.Asked("wide", {"x": x[: 200 if binary else 20]}, ["y"], binary, binary)
                answer = client.infer_packed(asked, request, response)
                np.testing.assert_array_equal(answer.outputs["y"], asked.inputs["x"])


Check = Callable[[Any], None]
COMMON: tuple[Check, ...] = (
    health_and_metadata, every_datatype_in_binary, every_datatype_in_json, binary_in_and_json_out_and_the_other_way_round,
    several_dimensions_and_batches, named_outputs_come_alone, batches_are_answered_row_by_row, the_id_comes_back,
    errors_say_what_is_wrong_and_the_connection_goes_on, eight_at_once_get_each_their_own_answer,
    a_thousand_requests_on_one_connection, large_answers_are_whole_packed_or_not, several_models_answer_at_once,
)  # fmt: skip
OF_TRITON: tuple[Check, ...] = (
    the_index_lists_every_model, loading_is_refused_with_the_reason, statistics_add_up, a_version_may_be_named,
    requests_and_answers_may_be_packed,
)  # fmt: skip
BY_CLIENT: dict[str, tuple[Check, ...]] = {"tritons": (*COMMON, *OF_TRITON), "kserves": COMMON}
