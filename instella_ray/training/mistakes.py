"""Which failures of workers Ray Train tries again: those that may not happen again."""

from __future__ import annotations

from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ..errors import UserError
from .trainer import NonFiniteLoss

HOPELESS = (UserError, NonFiniteLoss)
"""The next attempt would read the same input, and draw the same numbers."""


class MistakePolicy(DefaultFailurePolicy):
    """As Ray's own, but does not try again what is for people to mend."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = training_failed_error.worker_failures if isinstance(training_failed_error, WorkerGroupError) else {}
        if any(isinstance(failure, HOPELESS) for failure in failures.values()):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)
