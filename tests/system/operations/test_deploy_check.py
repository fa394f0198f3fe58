"""What is deployed works together: Prometheus scrapes, dashboards have data, an alert fires and resolves."""

from pathlib import Path

import pytest

from deploy.as_processes import check, dashboard_queries, what_is_missing


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing()))
def test_the_stack_scrapes_and_alerts(tmp_path: Path) -> None:
    took = check(tmp_path)
    assert took["dashboard queries answered"] == len(dashboard_queries()) > 10
    assert len(took) == 7
