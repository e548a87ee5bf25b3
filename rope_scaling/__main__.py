"""`python -m rope_scaling` is `rope-scaling`."""

from rope_scaling.cli.main import main


main()
