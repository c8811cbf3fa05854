"""What every optimizer promises, over the table of optimizers: state, gates, rates, configs."""

import sys

import pytest
import torch

from optim import OPTIMIZERS
from tests.optim.contract import (
    make_params,
    per_any,
    per_class,
    per_dtype,
    same,
    set_grads,
    snapshot,
)

pytestmark = pytest.mark.filterwarnings("ignore:no rule of optim.partition knows")


@per_class
@per_dtype
def test_state_is_eager_and_on_the_device(cls, dtype):
    params = make_params(dtype)
    opt = cls(params[:3], 1e-3)
    opt.add_param_group({"params": params[3:], "lr": 1e-2})
    for p in params:
        assert opt.state[p]["step"].dtype == torch.float32
        assert opt.state[p]["step"].shape == ()
        assert opt.state[p]["exp_avg"].shape == p.shape
        assert not opt.state[p]["exp_avg"].requires_grad
    assert [float(g["lr"]) for g in opt.param_groups] == [1e-3, 1e-2]
    assert all(isinstance(g["lr"], torch.Tensor) for g in opt.param_groups)


@per_any
@per_dtype
def test_memory_order_does_not_matter(cls, dtype):
    odd = make_params(dtype)
    plain = [p.detach().clone(memory_format=torch.contiguous_format) for p in odd]
    plain = [p.requires_grad_() for p in plain]
    a, b = cls(odd, 1e-2), cls(plain, 1e-2)
    for seed in range(3):
        set_grads(odd, seed)
        set_grads(plain, seed)
        odd[3].grad = odd[3].grad.t().contiguous().t()
        a.step()
        b.step()
    # vector lanes and the scalar rest of a row round differently
    tol = 4 * torch.finfo(dtype).eps
    for p, q in zip(odd, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol)


@per_any
def test_strided_storage_is_written_only_where_the_parameter_is(cls):
    base = torch.zeros(6, 8)
    p = base[:, ::2].requires_grad_()
    p.grad = torch.ones_like(p)
    cls([p], 0.1).step()
    assert (base[:, 1::2] == 0).all()
    assert (base[:, ::2] != 0).all()


@per_any
@per_dtype
@pytest.mark.parametrize("flag", [1.0, 3.0, float("inf"), float("nan")])
def test_found_inf_leaves_every_bit(cls, dtype, flag):
    params = make_params(dtype)
    opt = cls(params, 1e-2)
    set_grads(params, 1)
    opt.step()
    before = snapshot(opt)
    for p in params:
        p.grad.fill_(float("nan"))
    opt.step(found_inf=torch.tensor(flag))
    opt.step(found_inf=torch.tensor([flag]), grad_scale=torch.tensor(float("nan")))
    assert same(before, snapshot(opt))
    opt.step(found_inf=torch.tensor(True))
    assert same(before, snapshot(opt))


@per_class
@per_dtype
@torch.no_grad()
def test_the_gate_of_other_devices_leaves_every_bit(cls, dtype):
    """On the CPU the flag is read; elsewhere every write is a `where`. Here on CPU tensors."""
    params = make_params(dtype)
    opt = cls(params, 1e-2)
    group = opt.param_groups[0]
    set_grads(params, 1)
    for p in params:
        opt._update_one(group, p, group["lr"], None, torch.tensor(False))
    before = snapshot(opt)
    assert all(opt.state[p]["step"] == 1 for p in params)
    for p in params:
        p.detach().copy_(torch.where(p == p.flatten()[:1].sum(), -0.0, p.detach()))
        before = snapshot(opt)
        p.grad.fill_(float("nan"))
        opt._update_one(group, p, group["lr"], torch.tensor(2.0), torch.tensor(True))
        assert same(before, snapshot(opt))


@per_any
@per_dtype
def test_found_inf_zero_changes_nothing_about_a_step(cls, dtype):
    runs = []
    for found in (None, torch.zeros(()), torch.zeros(1), torch.tensor(False)):
        params = make_params(dtype)
        opt = cls(params, 1e-2)
        for seed in range(3):
            set_grads(params, seed)
            opt.step(found_inf=found)
        runs.append(snapshot(opt))
    assert all(same(runs[0], r) for r in runs[1:])


@per_any
@per_dtype
def test_gradients_are_divided_by_grad_scale(cls, dtype):
    runs = []
    for scale in (1.0, 1024.0):  # a power of two: exact in every dtype
        params = make_params(dtype)
        opt = cls(params, 1e-2)
        for seed in range(3):
            set_grads(params, seed, scale)
            opt.step(grad_scale=torch.tensor([scale]))
        runs.append(snapshot(opt))
    assert same(*runs)


@per_class
@per_dtype
def test_lr_zero_moves_only_the_state(cls, dtype):
    params = make_params(dtype)
    opt = cls(params, 0.0)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    opt.step()
    assert same(before, [p.detach() for p in params])
    assert float(opt.state[params[0]]["step"]) == 1
    assert opt.state[params[0]]["exp_avg"].abs().sum() > 0


@per_class
def test_lr_takes_floats_and_tensors_in_one_place(cls):
    def run(give):
        params = make_params()
        opt = cls(params, 0.5)
        own = opt.param_groups[0]["lr"]
        for seed, lr in enumerate((0.1, 0.0, 3e-4)):
            give(opt, lr)
            set_grads(params, seed)
            opt.step()
            assert opt.param_groups[0]["lr"] is own
            assert float(own) == lr
        return snapshot(opt)

    def assign(opt, lr):
        opt.param_groups[0]["lr"] = lr

    def assign_tensor(opt, lr):
        opt.param_groups[0]["lr"] = torch.tensor([lr], dtype=torch.float64)

    def fill(opt, lr):
        opt.param_groups[0]["lr"].fill_(lr)

    runs = [run(give) for give in (assign, assign_tensor, fill, lambda o, lr: o.set_lr(lr))]
    assert all(same(runs[0], r) for r in runs[1:])


@per_class
def test_groups_do_not_share_their_lr(cls):
    lr = torch.tensor(0.1)
    params = make_params()
    opt = cls([{"params": params[:2]}, {"params": params[2:]}], lr)
    opt.param_groups[0]["lr"] = 0.5
    set_grads(params, 0)
    opt.step()
    assert [round(float(g["lr"]), 6) for g in opt.param_groups] == [0.5, 0.1]
    assert float(lr) == pytest.approx(0.1)


@per_any
def test_torch_schedulers_drive_it(cls):
    params = make_params()
    opt = cls(params, 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 0.5**n)
    set_grads(params, 0)
    for n in range(3):
        assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.5**n)
        opt.step()
        scheduler.step()


@per_any
def test_parameters_without_gradient_are_skipped(cls):
    params = make_params()
    opt = cls(params, 1e-2)
    set_grads(params, 0)
    params[0].grad = None
    before = params[0].detach().clone()
    opt.step()
    assert torch.equal(params[0], before)
    assert float(opt.state[params[0]]["step"]) == 0
    assert float(opt.state[params[1]]["step"]) == 1


@per_any
def test_closure(cls):
    p = torch.ones(3, requires_grad=True)
    opt = cls([p], 0.1)

    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss.detach()

    assert float(opt.step(closure)) == 3.0
    assert (p < 1).all()


@per_any
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(cls, overflow):
    """The protocol of torch.amp: scale and flag arrive as attributes of the optimizer."""
    p = torch.ones(4, requires_grad=True)
    q = torch.ones(4, requires_grad=True)
    opt, plain = cls([p], 0.1), cls([q], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    weight = torch.tensor([1.0, -2.0, 3.0, float("inf") if overflow else 4.0])
    scaler.scale((p * weight).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert not hasattr(opt, "grad_scale")
    if overflow:
        assert (p == 1).all()
        assert scaler.get_scale() == 2.0**9
    else:
        (q * weight).sum().backward()
        plain.step()
        assert torch.equal(p, q)


def test_build_from_config():
    params = [("w", torch.nn.Parameter(torch.ones(3))), ("b", torch.nn.Parameter(torch.ones(())))]
    for name, config in OPTIMIZERS.items():
        assert config().name == name
        opt = config(weight_decay=0.25).build(params, 0.5)
        group = opt.param_groups[0]
        assert (float(group["lr"]), group["weight_decay"]) == (0.5, 0.25)
        assert group["betas"] == (0.9, 0.95)
        with pytest.raises(ValueError, match="Extra inputs"):
            config(unknown=1)
        with pytest.raises(ValueError, match="frozen"):
            config().weight_decay = 1.0
        for field in config.model_fields.values():
            assert field.description and "\n" not in field.description


def test_import_is_light():
    """Neither the package nor its configuration imports torch."""
    import subprocess

    code = (
        "import sys, optim, optim.config, optim.schedule; optim.OPTIMIZERS; optim.learning_rate;"
        "bad = {'torch', 'hydra', 'wandb'} & sys.modules.keys(); assert not bad, bad;"
        "assert set(optim.__all__) <= set(dir(optim)); [getattr(optim, n) for n in optim.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
