"""The simulated CUDA catches what it is there to catch."""

from __future__ import annotations


def test_skeleton(fake_cuda):
    sim = fake_cuda(2)
    from fastdp.backend.cuda import runtime as rt

    with rt.on(0):
        s = rt.stream_create(0)
        p = rt.malloc(0, 64)
        h = rt.host_alloc(64)
        rt.fill_async(p, 7, 64, s)
        rt.copy_async(h, p, 64, s)
        e = rt.event_create()
        rt.event_record(e, s)
        assert rt.event_done(e)
        a = rt.array(p, (16,), "float32", 0, None)
        assert a[4:].data.ptr == p + 16
        rt.event_destroy(e)
        rt.free(p)
        rt.host_free(h)
        rt.stream_destroy(s)
    assert sim.calls["malloc"] == 1
