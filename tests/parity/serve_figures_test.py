"""Figures of the engine count what they say, without a device where none is asked."""

from tests.parity import serve_figures
from tests.serve import tiny


def test_host_time_is_measured_without_device_work(tmp_path):
    model = tiny.pretrained(tmp_path)
    found = serve_figures.host_time(model, rows=4, steps=5)
    assert set(found) == {"host_ms_per_step_of_64_rows", "host_ms_per_admitted_request"}
    assert all(value > 0 for value in found.values())


def test_bytes_held_are_the_closed_form_to_a_page_beyond_one_chunk():
    for bytes_, closed, _ in serve_figures.held_bytes([100, 8192, 8193, 20_000]).values():
        assert 0 <= bytes_ - closed < 64 * (49_152 + 147_456)


def test_drafts_are_counted_by_steps_up_to_the_first_wrong_one():
    whole = [1, 2, 3, 4, 1, 2, 3, 4, 1]
    right = serve_figures.right_drafts(whole, 4, lambda h: [2, 3, 9])
    assert right == 2 / 2, "2 and 3 after the first token, then 4 in their place, then nothing"
    draft = serve_figures.by_peers_rule([1, 2, 7, 1, 2, 8, 1, 2], sizes=(2,), most=2, last=False)
    assert draft == [7, 1]
    assert serve_figures.by_peers_rule([1, 2, 7, 1, 2, 8, 1, 2], sizes=(2,), most=1, last=True) == [
        8
    ]
