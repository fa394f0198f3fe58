"""Figures of a run for trackers of experiments and for OTLP collectors, under the names that the metrics have."""
