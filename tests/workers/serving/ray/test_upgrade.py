"""Names that Serve applications deployed by 0.2 refer to."""

import importlib
import pickle

import pytest

from workers.serving.generation import RequestRejected
from workers.serving.ray import applications


@pytest.mark.parametrize("name", ["Ingress", "ModelReplica", "ingress_app", "model_app"])
def test_applications_deployed_by_0_2_are_found_under_their_old_import_paths(name: str) -> None:
    old = importlib.import_module("workers.serving.ray_apps")
    assert getattr(old, name) is getattr(applications, name)


def test_a_rejection_pickled_by_0_2_is_read() -> None:
    rejection = RequestRejected(503, "later", "server_error")
    pickled = pickle.dumps(rejection, protocol=0).replace(b"RequestRejected", b"Refused")
    assert b"workers.serving.generation\nRefused" in pickled
    assert pickle.loads(pickled) == rejection
