"""What cannot be captured is found before a capture begins; what can is."""

from __future__ import annotations

import pytest
import torch

from onegpu.engine.capture import Graph, NoHostSync, NotCapturableError, Plain

X = torch.arange(6.0)


@pytest.mark.parametrize(
    "waits",
    [
        lambda: X.sum().item(),
        lambda: bool(X.any()),
        lambda: X.nonzero(),
        lambda: X[X > 2],
        lambda: torch.masked_select(X, X > 2),
        lambda: X.unique(),
        lambda: X.repeat_interleave(torch.arange(6)),
        lambda: torch.bincount(X.long()),
        lambda: torch.equal(X, X),
    ],
)
def test_an_op_that_waits_for_the_device_is_found(waits):
    with pytest.raises(NotCapturableError, match="waits for the device"):
        Plain(waits)
    waits()  # for this thread and this block only


def test_ops_that_do_not_wait_pass():
    target = torch.zeros(6)

    def run():
        target.index_copy_(0, torch.tensor([2]), X[torch.tensor([3])])
        target.add_(X.softmax(0).argmax())

    step = Plain(run)
    step()
    assert target.tolist() == [10.0, 10.0, 8.0, 10.0, 10.0, 10.0]


@pytest.mark.parametrize("at", [0, 1, -1, -2])
@pytest.mark.parametrize("index", [lambda i: (..., [i], slice(None)), lambda i: [i], lambda i: (None, [i])])
def test_one_number_in_a_list_is_a_slice(at, index):
    x, index = torch.randn(3, 4, 2), index(at)
    want, made = x[index], []
    Plain(lambda: made.append(x[index]))
    assert torch.equal(made[0], want) and made[0].data_ptr() != want.data_ptr()
    assert x.data_ptr() <= made[0].data_ptr() < x.data_ptr() + 4 * x.numel()  # a view: nothing was looked up


@pytest.mark.parametrize("index", [([0], [1]), ([0], 1), [0, 2], [True, False, True], ([0], torch.tensor([1]))])
def test_other_indices_stay_what_they_are(index):
    x, made = torch.randn(3, 4, 2), []
    if isinstance(index, list) and index[0] is True:
        with pytest.raises(NotCapturableError):
            Plain(lambda: x[index])
        return
    Plain(lambda: made.append(x[index]))
    assert torch.equal(made[0], x[index])


def test_another_thread_is_not_concerned():
    import threading

    seen = []
    with NoHostSync():
        thread = threading.Thread(target=lambda: seen.append(X.sum().item()))
        thread.start()
        thread.join()
    assert seen == [15.0]


@pytest.mark.gpu
def test_a_graph_replays_and_a_refused_one_leaves_no_trace():
    device = torch.device("cuda", torch.cuda.current_device())
    total, one = torch.zeros(4, device=device), torch.ones(4, device=device)
    pool = torch.cuda.graph_pool_handle()

    def run():
        total.add_(one @ one)

    with pytest.raises(NotCapturableError):
        Graph(lambda: total.add_(one.sum().item()), device, pool, warm=True)
    graph = Graph(run, device, pool, warm=True)
    before = total.clone()
    one.fill_(2)  # a replay reads what is there now
    graph()
    graph()
    torch.cuda.synchronize()
    assert torch.equal(total, before + 32)
    torch.empty(1 << 20, device=device).fill_(1)  # the allocator is in order
    generator = torch.cuda.default_generators[device.index]
    with pytest.raises(NotCapturableError):
        Graph(lambda: total.copy_(torch.rand(4)), device, pool)  # found by CUDA, in the middle of the capture
    before = generator.get_state()
    assert torch.rand(4, device=device).std() > 0  # it draws again, from where it was
    assert not torch.equal(generator.get_state(), before)
