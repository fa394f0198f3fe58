"""What operators see of the service: metrics, HTTP, logs; and how its memory is kept."""
