from statistics import median

import pytest

from experiments.bench import peak
from experiments.bench.peak import PeakMeter


def test_every_product_is_sampled_and_the_best_one_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = PeakMeter.for_shapes({"own": (4, 6, 8)}, squares=(16,))
    monkeypatch.setattr(peak, "seconds_of", lambda call: (call(), 0.5)[1])
    monkeypatch.setattr(peak, "_matmul", lambda a, b: None)
    meter.sweep(samples=2)
    assert set(meter.rates) == {"16 square", "own"}
    # Small products are repeated 32 times within a sample, here of half a second.
    assert meter.rates["own"] == [2 * 4 * 6 * 8 * 32 / 0.5] * 2
    assert meter.best_shape == "16 square"
    meter.probe()
    assert {name: len(rates) for name, rates in meter.rates.items()} == {"16 square": 3, "own": 2}


def test_peak_is_the_best_median_not_the_luckiest_sample() -> None:
    meter = PeakMeter({}, {"steady": [9.0, 10.0, 11.0], "lucky": [5.0, 5.0, 30.0]})
    assert (meter.best_shape, meter.peak, meter.best_sample) == ("steady", median([9.0, 10.0, 11.0]), 30.0)


def test_a_real_product_has_a_finite_rate() -> None:
    meter = PeakMeter.for_shapes({}, squares=(256,))
    meter.sweep(samples=1)
    assert 1e6 < meter.peak < 1e15
