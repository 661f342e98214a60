"""Dynamic loss scaling for fp16, with the rule and the state of ``torch.amp.GradScaler``.

GradScaler itself wants to unscale the gradients of an optimizer; under ZeRO they are partitioned, and ZeRO unscales.
"""

from collections.abc import Mapping

_GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """What losses are multiplied by; 1 and constant where it is off.

    Args:
        enabled: Whether gradients are in fp16 and need it.

    Attributes:
        value: The scale of the next backward pass.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 65536.0 if enabled else 1.0
        self._finite_steps = 0

    def update(self, finite: bool) -> None:
        """After a step: halves the scale where a gradient was not finite, doubles it after 2000 steps that were."""
        if not self.enabled:
            return
        self._finite_steps = self._finite_steps + 1 if finite else 0
        if not finite:
            self.value *= _BACKOFF
        elif self._finite_steps == _INTERVAL:
            self.value, self._finite_steps = self.value * _GROWTH, 0

    def state(self) -> dict[str, float]:
        """As GradScaler's, so that every engine reads it; empty where it is off."""
        if not self.enabled:
            return {}
        return {
            "scale": self.value,
            "growth_factor": _GROWTH,
            "backoff_factor": _BACKOFF,
            "growth_interval": _INTERVAL,
            "_growth_tracker": self._finite_steps,
        }

    def load(self, state: Mapping[str, float]) -> None:
        """Continues from :meth:`state`."""
        if self.enabled and state:
            self.value, self._finite_steps = float(state["scale"]), int(state["_growth_tracker"])
