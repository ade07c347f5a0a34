"""The devices of a parallel model: those that are there, and those that were lost and join again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdp.runtime.queue import QueueDevice

if TYPE_CHECKING:
    from fastdp.keras.steps.standard import Steps


class Membership:
    """Gives a parallel model its devices. The attributes are the model's; further bases are a Keras model's."""

    _steps: Steps
    _in_fit: bool

    @property
    def devices(self) -> list[QueueDevice]:
        """The devices of the replicas, in the order of the rows: without those that are lost."""
        return self._steps.devices

    def rejoin_devices(self) -> list[str]:
        """Take back devices that were lost and answer again; see `on_device_loss` of `fastdp.wrap`.

        `fit` does so at the beginning of each epoch.

        Returns:
            Their names; empty where none is back.
        """
        return self._steps.roster.rejoin()

    def reset_metrics(self) -> None:
        """As in Keras. `fit` calls it at the beginning of each epoch, where devices that were lost may join again."""
        if self._in_fit and self._steps.roster.lost:
            self.rejoin_devices()
        model: Any = super()
        model.reset_metrics()
