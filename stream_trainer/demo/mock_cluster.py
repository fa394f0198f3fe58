"""`python -m stream_trainer.demo.mock_cluster TOPIC...`: librdkafka's mock cluster as a process of its own.

It writes `host:port` to standard output, and runs until its standard input closes, which happens too when whoever
started it dies. The mock creates no topics on request, only those that a client with automatic creation asks about;
so the topics are named here. Each has the mock's four partitions.
"""

import sys
from collections.abc import Sequence

from confluent_kafka import Producer

TIMEOUT_S = 60.0


def main(topics: Sequence[str]) -> None:
    """Serve until standard input ends."""
    # The addresses are the mock's own: what is given as bootstrap.servers is never asked.
    client = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "mock"})
    for topic in topics:
        client.list_topics(topic, timeout=TIMEOUT_S)
    brokers = client.list_topics(timeout=TIMEOUT_S).brokers.values()
    print(",".join(f"{broker.host}:{broker.port}" for broker in brokers), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
