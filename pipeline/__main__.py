"""`python -m pipeline` is the edgewater command: how the supervisor starts its children."""

from pipeline.cli import main

main()
