"""deepspeed.accelerator's names for the only device that there is here."""

from __future__ import annotations

import torch


class CpuAccelerator:
    """The CPU."""

    def device_name(self, device_index: int | None = None) -> str:
        return "cpu"

    def current_device_name(self) -> str:
        return "cpu"

    def current_device(self) -> str:
        return "cpu"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing: every rank has its own threads."""

    def is_available(self) -> bool:
        return True

    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return False

    def communication_backend_name(self) -> str:
        return "gloo"

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing: what is called is done."""

    def empty_cache(self) -> None:
        """Nothing."""


def get_accelerator() -> CpuAccelerator:
    """The CPU."""
    return CpuAccelerator()
