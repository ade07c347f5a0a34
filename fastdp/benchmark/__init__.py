"""Measures how fast a model trains: `fastdp bench`, its worker processes, results, reports and the plan."""
