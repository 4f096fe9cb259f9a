"""The line about a composed model that is far worse than its dense one."""

from typing import Any

import pytest

from composable.tasks.base import warn_if_far_worse

COMPOSED = {"composed": {"configuration": 0, "bundles": ["modules.npy"]}}


def trained(loss: float, data: str = "texts") -> dict[str, Any]:
    return {"baseline": {"validation_loss": loss, "data": data}}


@pytest.mark.parametrize(
    ("history", "loss", "is_said"),
    [
        ([trained(1.5), COMPOSED], 3.01, True),
        ([trained(1.5), COMPOSED], 2.99, False),
        ([trained(9.0), trained(1.5), COMPOSED], 3.01, True),  # the last one counts
        ([trained(1.5), trained(9.0), COMPOSED], 3.01, False),
        ([trained(1.5, "other"), COMPOSED], 3.01, False),
        ([trained(1.5)], 3.01, False),  # a dense model
        ([COMPOSED, trained(1.5)], 3.01, False),  # trained since it was composed, not before
        ([COMPOSED], 3.01, False),
        ([], 3.01, False),
        ([trained(0.01), COMPOSED], 0.05, False),  # of next to nothing twice is no more
        ([trained(0.01), COMPOSED], 0.12, True),
        # what a file may hold as well
        (["x", {"baseline": 3}, {"baseline": {"validation_loss": "x", "data": "texts"}}, COMPOSED],
         3.01, False),
    ],
)  # fmt: skip
def test_far_worse(
    history: list[Any], loss: float, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_far_worse({"history": history}, loss, "texts")
    assert bool(caplog.records) == is_said
    if is_said:
        [record] = caplog.records
        said = record.getMessage()
        assert said.startswith("far worse than the dense model: its loss on texts was ")
        assert f"this one's is {loss:.2f}" in said
