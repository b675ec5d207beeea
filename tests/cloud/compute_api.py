"""Compute Engine."""

from tests.cloud.answers import Asked, Json, Refused


class ComputeApi:
    def __init__(self, cloud):
        self._cloud = cloud

    def answer(self, asked: Asked) -> Json:
        raise Refused(404, "NOT_FOUND", "none yet")

    def preempt(self, name, after_s):
        return False

    maintenance = preempt

    def remaining(self):
        return []

    machines = remaining
