"""What the user's terms make of a whole run: a limit that cannot be measured, an allowance, a rounding by chance."""

from __future__ import annotations

from pathlib import Path

from tests.parity import heads
from tests.supervisor.run.conftest import TARGET, Action


def test_a_limit_that_cannot_be_measured_publishes_nothing_unless_that_is_allowed(
    action: Action, base: Path, tmp_path: Path
) -> None:
    trained = heads.Trained(task="SEQ_CLS", labels=3, options={"target_modules": ["q_proj"]})
    adapter = heads.save_adapter(base, tmp_path / "adapter", trained)
    terms = (
        "--quality-limits", "kl-mean-nats<=1", "--verify-tolerance", "end-to-end=2e-4",
        "--rounding", "stochastic", "--rounding-seed", "5",
    )  # fmt: skip

    refused = action.publish(base, adapter, *terms)
    assert (refused.code, refused.outputs["status"]) == (8, "NOT_VERIFIED"), refused.log
    assert refused.outputs["commit-sha"] == ""
    assert action.hub.repo(TARGET) is None

    allowed = action.publish(base, adapter, *terms, "--allow", "not-verified")
    assert (allowed.code, allowed.outputs["status"]) == (0, "NOT_VERIFIED"), allowed.log
    assert allowed.outputs["verified"] == "false"
    repo = action.hub.repo(TARGET)
    assert repo is not None
    card = repo.read("README.md", "v1.0.0").decode()
    assert "nobody knows whether this merge is right" in card
    assert "end to end from 0.0001 to 0.0002" in card
    assert "| rounding-seed | <code>5</code> |" in card
    assert b'"status": "NOT_VERIFIED"' in repo.read("merge-manifest.json", "v1.0.0")
    assert b'"loosened_from": 0.0001' in repo.read("merge-manifest.json", "v1.0.0")
    assert "Loosened limits" in (tmp_path / "report" / "report.md").read_text()

    again = action.publish(base, adapter, *terms)
    assert again.code == 9, again.log
    assert "was not verified" in again.log
