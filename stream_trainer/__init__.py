"""Stream Trainer: fine-tunes a language model continuously from a stream, on the samples that help its target."""

__version__ = "0.1.0"
