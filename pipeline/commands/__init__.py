"""The verbs of the command line, a module for each group of them; `pipeline.cli` gathers them."""

__all__: list[str] = []
