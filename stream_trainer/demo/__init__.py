"""The demo: broker, stream, two runs of the service and a report, on one machine."""
