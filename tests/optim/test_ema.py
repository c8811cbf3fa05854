"""EMA: the average, the gate, the exchange by pointer, saving."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import EMA


@given(
    rate=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.sampled_from([(), (0,), (3, 2)]),
)
@settings(max_examples=20, deadline=None)
def test_average(rate, dtype, shape):
    p = torch.randn(shape, dtype=dtype)
    ema = EMA([p], rate)
    want = p.double().clone()
    for _ in range(5):
        p.copy_(torch.randn(shape, dtype=dtype))
        ema.update()
        want = rate * want + (1 - rate) * p.double()
    tol = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(ema.shadow["0"].double(), want.double(), rtol=tol, atol=tol)


def test_a_resting_parameter_keeps_its_shadow_to_the_bit():
    p = torch.randn(1000)
    ema = EMA([("w", p)], 0.999)
    for _ in range(100):
        ema.update()
    assert torch.equal(ema.shadow["w"], p)


def test_found_inf_gates_the_update():
    p = torch.randn(4)
    ema = EMA([p], 0.5)
    before = ema.shadow["0"].clone()
    p.fill_(float("nan"))
    ema.update(found_inf=torch.tensor([2.0]))
    assert torch.equal(ema.shadow["0"], before)
    p.fill_(1.0)
    ema.update(found_inf=torch.tensor(0.0))
    assert torch.equal(ema.shadow["0"], torch.lerp(before, p, 0.5))


def test_applied_exchanges_pointers_and_undoes_it_after_an_exception():
    module = torch.nn.Linear(3, 2)
    ema = EMA(module.named_parameters(), 0.5)
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update()
    old, average = module.weight.data_ptr(), ema.shadow["weight"].data_ptr()
    values = ema.shadow["weight"].clone()
    for error in (False, True):
        try:
            with ema.applied():
                assert module.weight.data_ptr() == average
                assert ema.shadow["weight"].data_ptr() == old
                assert torch.equal(module.weight, values)
                for call in (ema.update, ema.state_dict, lambda: ema.load_state_dict({})):
                    with pytest.raises(RuntimeError, match="averages are applied"):
                        call()
                with pytest.raises(RuntimeError, match="entered twice"), ema.applied():
                    pass
                assert module.weight.data_ptr() == average
                if error:
                    raise KeyError
        except KeyError:
            pass
        assert module.weight.data_ptr() == old
        assert ema.shadow["weight"].data_ptr() == average


def test_half_precision_is_averaged_in_float32():
    p = torch.ones(3, dtype=torch.bfloat16)
    ema = EMA([p], 0.999)
    p.fill_(2.0)
    for _ in range(10):
        ema.update()
    assert ema.shadow["0"].dtype == torch.float32
    assert 1.009 < float(ema.shadow["0"][0]) < 1.01
    with ema.applied():
        assert p.dtype == torch.bfloat16
        assert p[0] == ema_cast(1.00996)
    assert (p == 2).all()
    assert EMA([p], dtype=torch.bfloat16).shadow["0"].dtype == torch.bfloat16


def ema_cast(x):
    return torch.tensor(x).bfloat16()


def test_state_by_name_in_place():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    one, two = EMA(a.named_parameters()), EMA(b.named_parameters())
    address = two.shadow["bias"].data_ptr()
    two.load_state_dict(one.state_dict())
    assert two.shadow["bias"].data_ptr() == address
    assert all(torch.equal(one.shadow[n], two.shadow[n]) for n in one.shadow)
    before = two.shadow["weight"].clone()
    for bad, message in [
        ({"weight": a.weight}, r"missing \['bias'\]"),
        ({**one.state_dict(), "x": a.bias}, r"unknown \['x'\]"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(5)}, "state of 'bias' has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            two.load_state_dict(bad)
        assert torch.equal(two.shadow["weight"], before)


def test_errors():
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate must be"):
            EMA([torch.zeros(1)], rate)
    with pytest.raises(ValueError, match="two parameters named 'w'"):
        EMA([("w", torch.zeros(1)), ("w", torch.zeros(1))])
    with pytest.raises(ValueError, match="floating-point"):
        EMA([torch.zeros(1, dtype=torch.long)])
