"""`python -m saekit` is `saekit`, which `torchrun -m saekit …` needs."""

from saekit.cli import entry

entry()
