"""Ceremony to verified bundle on disk, through every real part."""

import datetime as dt
import json
import time

from cryptography import x509

from tests.integration.tuf.conftest import DeviceHere


def test_a_bundle_goes_from_the_approvers_key_to_a_verified_slot(fleet, device, make_bundle):
    bundle = make_bundle("gas", "1.0.0")
    fleet.approve(bundle, gas="0.9.0")
    fleet.repository.publish_group("line-1", fleet.document())

    synced = device.sync()
    assert json.loads(synced["group_document"])["generation"] == 1
    assert synced["floors"] == {"gas": "0.9.0"}
    assert synced["catalog_error"] is None
    assert synced["membership"] == {
        "group": "line-1",
        "tags": {"hall": "a"},
        "version": 3,
        "logs": 0,
        "orders": {},
        "alone": False,
    }
    assert synced["tuf"]["catalog"] == 2
    assert abs(synced["signed_at"] - fleet.clock().timestamp()) < 60

    manifest = device.manifest(bundle)["manifest"]
    assert manifest.encode() == bundle.manifest
    fetched = device.ok("fetch", digest=bundle.digest, manifest=manifest, files=bundle.files)
    assert fetched == {"bytes": sum(file["size"] for file in bundle.files), "files": {"resuming": 2}}
    staging = device.state_dir / "slots" / ".staging" / bundle.digest
    assert (staging / "manifest.json").read_bytes() == bundle.manifest
    assert (staging / "model.onnx").read_bytes() in bundle.blobs.values()
    left = {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}
    assert left == {"manifest.json", "model.onnx", "golden/cases.jsonl"}
    assert device.progress[-1]["total_done"] == device.progress[-1]["total_size"]


def test_a_group_without_a_document_and_a_silent_device_api_are_said_so(fleet, device):
    fleet.site.devices.clear()
    synced = device.sync()
    assert synced["group_document"] is None
    assert synced["membership"] is None
    assert synced["self_error"]["code"] == "unknown_device"


def test_renewal_brings_a_new_certificate_for_the_same_key(device):
    before = (device.state_dir / "identity" / "device.pem").read_bytes()
    key = (device.state_dir / "identity" / "device.key").read_bytes()
    answer = device.ok("renew")
    assert answer["expires_s"] > 0
    assert (device.state_dir / "identity" / "device.pem").read_bytes() != before
    assert (device.state_dir / "identity" / "device.key").read_bytes() == key
    assert (device.state_dir / "identity" / "device.key").stat().st_mode & 0o777 == 0o600


def test_a_certificate_that_has_not_begun_by_the_servers_time_is_renewed_at_once(fleet, device):
    """It was issued while the server's clock ran a year ahead; now that is right, no broker takes it, and two thirds of its life are far off."""
    place = device.state_dir / "identity" / "device.pem"
    key = x509.load_pem_x509_certificate(place.read_bytes()).public_key()
    ahead = fleet.clock() + dt.timedelta(days=400)
    place.write_text(fleet.site.authority.issue_device("d-1", key, ahead).certificate_pem)
    assert device.sync()["renew_at_s"] == 0.0
    # Whatever the device takes the time for; nor does a silent server make it ask.
    assert device.sync(now_s=1.0)["renew_at_s"] == 0.0
    device.ok("renew")
    assert device.sync(now_s=1.0)["renew_at_s"] > time.time() + 200 * 86_400


def test_a_device_whose_clock_is_years_ahead_is_told_which_time_it_takes_it_to_be(fleet, device):
    here = DeviceHere(fleet, device.state_dir)
    answer = here.ask("sync", group="line-1", now_s=4_102_444_800.0)["error"]
    assert answer["code"] == "unreachable"
    assert (
        "its certificate expired" in answer["detail"]
        and "2100-01-01 00:00 UTC by this device's clock" in answer["detail"]
    )
