from experiments.run.server.metrics import BOUNDS, Metrics


def test_prometheus_reads_counts_gauges_and_histograms():
    now = [0.0]
    metrics = Metrics(["all", "short"], lambda: now[0])
    metrics.ended["all", "length"] += 2
    metrics.refused[429] += 1
    for seconds in (0.01, 0.02, 7.0, 1e9):
        metrics.whole["all"].add(seconds)
    for step in range(30):
        now[0] = float(step)
        metrics.wrote("short", 5)
    text = metrics.text({"all": dict(pages=9), "short": dict(pages=4)})
    lines = text.splitlines()
    for line in (
        'effjax_requests_total{cache="all",end="length"} 2',
        'effjax_refused_total{status="429"} 1',
        'effjax_tokens_total{cache="short"} 150',
        "effjax_tokens_per_second 5.500",  # steps 19 to 29
        'effjax_pages{cache="short"} 4',
        'effjax_request_seconds_bucket{cache="all",le="0.01"} 1',
        'effjax_request_seconds_bucket{cache="all",le="0.025"} 2',
        'effjax_request_seconds_bucket{cache="all",le="10.0"} 3',
        'effjax_request_seconds_bucket{cache="all",le="+Inf"} 4',
        'effjax_request_seconds_count{cache="all"} 4',
    ):
        assert line in lines
    assert len([line for line in lines if "request_seconds_bucket" in line]) == 2 * (len(BOUNDS) + 1)
    assert all(line.startswith("# TYPE") or len(line.split()) == 2 for line in lines)


def test_the_mean_is_of_all_lanes():
    metrics = Metrics(["all", "short"])
    assert metrics.mean_seconds() == 1.0
    metrics.whole["all"].add(4.0)
    metrics.whole["short"].add(8.0)
    assert metrics.mean_seconds() == 6.0
