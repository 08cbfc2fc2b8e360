"""A bundle's folder: every byte is checked, and nothing but listed regular files may lie there."""

import os
import socket

import pytest
from skerry_runtime.bundle import fitting_variant, open_bundle
from skerry_runtime.errors import Rejected


@pytest.fixture
def folder(models, tmp_path):
    models.build_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def refusal(folder, **options):
    with pytest.raises(Rejected) as caught:
        open_bundle(folder, **options)
    return caught.value


def test_a_whole_bundle_opens_under_its_digest(models, tmp_path):
    digest = models.build_bundle(tmp_path / "b", model="pump", version="2.0.1")
    bundle = open_bundle(tmp_path / "b", digest=digest)
    assert bundle.digest == digest
    assert (bundle.manifest.model, bundle.manifest.version) == ("pump", "2.0.1")
    assert bundle.path("model.onnx").read_bytes() == bundle.read("model.onnx", max_bytes=1 << 20)


def test_another_bundle_than_the_one_meant_is_refused(folder):
    fault = refusal(folder, digest="0" * 64)
    assert fault.code == "hash_mismatch"
    assert "manifest.json" in fault.detail


def test_one_flipped_byte_is_found_and_named(folder):
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    fault = refusal(folder)
    assert fault.code == "hash_mismatch"
    assert fault.detail.startswith("model.onnx: wanted sha256 ")
    assert fault.advice
    # Without hashing, size and kind are still checked; the byte is not seen.
    open_bundle(folder, hashes=False)


@pytest.mark.parametrize("changed", [False, True])
def test_a_large_file_is_hashed_as_a_small_one(models, tmp_path, changed):
    digest = models.build_bundle(tmp_path / "b", padding=5 << 20)
    if changed:
        with open(tmp_path / "b" / "padding.bin", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        assert refusal(tmp_path / "b").code == "hash_mismatch"
    else:
        assert open_bundle(tmp_path / "b", digest=digest).digest == digest


def test_a_byte_flipped_after_opening_is_not_read(folder):
    bundle = open_bundle(folder)
    (folder / "golden.jsonl").write_bytes((folder / "golden.jsonl").read_bytes().replace(b"FP32", b"FP64", 1))
    with pytest.raises(Rejected, match="hash_mismatch"):
        bundle.read("golden.jsonl", max_bytes=1 << 20)


def test_a_cut_file_is_refused_also_without_hashing(folder):
    os.truncate(folder / "model.onnx", 10)
    assert refusal(folder, hashes=False).code == "size_mismatch"


def test_a_missing_file_is_named(folder):
    (folder / "golden.jsonl").unlink()
    fault = refusal(folder)
    assert (fault.code, fault.detail.split(":")[0]) == ("file_missing", "golden.jsonl")


@pytest.mark.parametrize("name", ["extra.txt", "sub/extra.txt", ".hidden"])
def test_an_unlisted_file_is_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    fault = refusal(folder)
    assert (fault.code, fault.detail.split(":")[0]) == ("file_unlisted", name)


def test_a_signature_may_lie_beside_the_manifest(folder):
    (folder / "model.sig").write_text("{}")
    open_bundle(folder)


def test_a_link_is_refused_even_to_the_right_bytes(folder, tmp_path):
    target = tmp_path / "elsewhere.onnx"
    (folder / "model.onnx").rename(target)
    (folder / "model.onnx").symlink_to(target)
    fault = refusal(folder)
    assert fault.code == "not_a_file"
    assert "a symbolic link" in fault.detail


def test_a_linked_folder_and_a_linked_manifest_are_refused(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (folder / "sub").symlink_to(tmp_path / "outside")
    assert refusal(folder).code == "not_a_file"
    (folder / "sub").unlink()
    (folder / "manifest.json").rename(tmp_path / "m.json")
    (folder / "manifest.json").symlink_to(tmp_path / "m.json")
    assert refusal(folder).code == "not_a_file"


def test_a_fifo_is_refused_without_waiting_for_a_writer(folder):
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    assert "a FIFO" in refusal(folder).detail
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert refusal(folder).code == "not_a_file"


def test_a_socket_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)  # the path of a unix socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        assert "a socket" in refusal(folder).detail


@pytest.mark.parametrize("path", ["../model.onnx", "/etc/passwd", "a/../../b", "a//b", "", "..", ".git/x", "a\\b"])
def test_a_path_that_could_leave_the_folder_is_refused(folder, path):
    import json

    from skerry_contract import canonical

    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["variants"][0]["files"][0]["path"] = path
    (folder / "manifest.json").write_bytes(canonical.encode(manifest))
    assert refusal(folder).code == "malformed_manifest"


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"{" * 100_000, b'{"schema": 1}', b"\xff", b'{"a":' * 50_000])
def test_a_manifest_that_is_none_is_refused(folder, data):
    (folder / "manifest.json").write_bytes(data)
    assert refusal(folder).code == "malformed_manifest"


def test_a_manifest_with_a_space_in_it_is_another_and_malformed(folder):
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data + b"\n")
    assert refusal(folder).code == "malformed_manifest"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert refusal(tmp_path / "nowhere").code == "file_missing"
    (tmp_path / "file").write_text("x")
    assert refusal(tmp_path / "file").code == "file_missing"


def test_only_the_files_of_the_staged_variant_are_needed(models, tmp_path):
    import json
    import shutil

    from skerry_contract import canonical

    models.build_bundle(tmp_path / "b")
    manifest = json.loads((tmp_path / "b/manifest.json").read_bytes())
    other = json.loads(json.dumps(manifest["variants"][0]))
    other["id"], other["arch"], other["model"] = "onnx-arm", ["armv7l"], "arm.onnx"
    other["files"] = [other["files"][0], {**other["files"][1], "path": "arm.onnx"}]
    manifest["variants"].append(other)
    (tmp_path / "b/manifest.json").write_bytes(canonical.encode(manifest))
    assert refusal(tmp_path / "b").code == "file_missing"
    bundle = open_bundle(tmp_path / "b", variants=["onnx-fp32"])
    assert refusal(tmp_path / "b", variants=["onnx-arm"]).code == "file_missing"
    assert refusal(tmp_path / "b", variants=["tflite"]).code == "no_variant"
    shutil.copy(tmp_path / "b/model.onnx", tmp_path / "b/arm.onnx")
    open_bundle(tmp_path / "b")

    def pick(arch, runtimes):
        found = fitting_variant(bundle.manifest, arch=arch, runtimes=runtimes)
        return found and found.id

    assert pick("x86_64", {"onnx"}) == "onnx-fp32"
    assert pick("x86_64", {"tflite"}) is None


def test_a_path_the_manifest_does_not_list_cannot_be_asked_for(folder):
    bundle = open_bundle(folder)
    with pytest.raises(KeyError):
        bundle.path("../secret")
    with pytest.raises(KeyError):
        bundle.read("manifest.json", max_bytes=10)
