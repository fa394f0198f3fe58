"""The commands beside `run` and `demo`. Each module has `add_arguments(parser)` and `run(args)`."""
