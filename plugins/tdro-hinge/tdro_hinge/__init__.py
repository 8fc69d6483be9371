from dataclasses import dataclass


@dataclass(frozen=True)
class Hinge:
    """Count only the loss above `margin` times the reference loss."""

    margin: float = 1.0

    def __call__(self, losses):
        return losses.mean_by_task((losses.proxy - self.margin * losses.reference).clamp_min(0.0))
