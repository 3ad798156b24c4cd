"""Learning: turn windows of samples into versions. Only this package loads torch, transformers and peft."""

from __future__ import annotations

__all__: list[str] = []
