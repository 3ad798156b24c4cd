"""The dataflow and the command line."""

__all__: list[str] = []
