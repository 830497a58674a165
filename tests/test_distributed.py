"""DDP, FSDP2, tensor and pipeline parallelism on four processes: one group, many checks."""

import pytest
import ranks
import torch.distributed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.xdist_group("distributed"),
]


@pytest.fixture(scope="module")
def went(tmp_path_factory, request):
    """How every check that was asked for went, on all ranks."""
    wanted = {item.callspec.params["check"] for item in request.session.items if "check" in getattr(
        getattr(item, "callspec", None), "params", {})}  # fmt: skip
    checks = [name for name in ranks.names() if name in wanted]
    return ranks.run(tmp_path_factory.mktemp("ranks"), checks)


@pytest.mark.parametrize("check", ranks.names())
def test_on_four_ranks(went, check):
    assert not went[check], went[check]
