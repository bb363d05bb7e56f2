"""`python -m bdtool` is `bdtool`."""

from bdtool.cli import main

main(prog_name="bdtool")
