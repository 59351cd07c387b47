"""lora-merge-action: a LoRA adapter becomes a verified, tagged release.

    Inputs ──▶ Plan ──▶ MergedCheckpoint ──▶ Verdict ──▶ Release ──▶ Report

Two processes do it. The supervisor (`supervisor.main`) reads the inputs, checks everything that can be checked before
any work (`supervisor.preflight`), and goes through the run's phases one after the other (`supervisor.run`). It holds
the tokens and never imports torch. It starts the worker (`worker.main`), inline or in a container with a GPU, which has
torch and no token; the two talk in JSON lines (`protocol.events`).

    protocol/      what both processes know
    files/         folders on disk; no torch
    architecture/  model classes without weights, and the names of their parameters
    judge/         base, adapter and merged folder in, verdict out
    worker/        the plan, and the merge unit by unit
    supervisor/    everything else: inputs, the Hub, publishing, the report

Where to start reading: `worker.plan` says what happens to each tensor, `worker.merge.job` does it, `judge.judge` has
the layers of the proof (`structure`, `storage`, `semantics`, `outputs`), `supervisor.publish.job` makes the one commit
and the tag. An arrow between two rooms always points down this list's order: a room imports those above it, and
supervisor and worker never see each other. `lint-imports` holds that.
"""

__version__ = "0.1.0"
