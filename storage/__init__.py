"""Durable state on one device: the ring, the registry, locks. Imports nothing of ours from above."""

__all__: list[str] = []
