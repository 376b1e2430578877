"""`python -m chanflow` is the command."""

from chanflow.cli.main import main

main(prog_name="chanflow")
