"""Tests of many cases, of which few are run every day."""

import itertools

import pytest


class Item:
    def __init__(self, nodeid, marker=None):
        self.nodeid, self.marker, self.slow = nodeid, marker, False

    def get_closest_marker(self, name):
        assert name == "thin"
        return self.marker

    def add_marker(self, marker):
        assert marker.name == "slow"
        self.slow = True


def test_one_in_n_is_left_and_every_value_of_two_parameters_of_n(request):
    (conftest,) = (x for x in request.config.pluginmanager.get_plugins() if hasattr(x, "thin_out"))
    marker = pytest.mark.thin(3).mark
    thin = [Item(f"test_a[{a}-{b}]", marker) for a, b in itertools.product(range(3), repeat=2)]
    others = [Item("test_b[0-1]"), Item("test_c", marker)]
    conftest.thin_out([*others, *thin])
    assert [item.nodeid for item in thin if not item.slow] == ["test_a[0-0]", "test_a[1-2]", "test_a[2-1]"]
    assert not any(item.slow for item in others)
