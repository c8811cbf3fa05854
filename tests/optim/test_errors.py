"""What every optimizer refuses, in one sentence."""

import pytest
import torch

from optim import AdamATan2, AdamMini, AdamW, Muon, SparseSignSGD
from tests.optim.contract import (
    per_any,
)

pytestmark = pytest.mark.filterwarnings("ignore:no rule of optim.partition knows")


@per_any
def test_errors_are_sentences(cls):
    p = torch.zeros(3, requires_grad=True)
    cases = [
        ([p * 2], {}, "not a leaf"),
        ([torch.zeros(3, dtype=torch.complex64)], {}, "complex"),
        ([("w", torch.zeros(3, dtype=torch.int64))], {}, "parameter 'w' is torch.int64"),
        ([torch.zeros(2, 2).to_sparse()], {}, "must be dense"),
        ([torch.zeros(2, device="meta")], {}, "is on meta: supported are cpu, cuda"),
        ([p], {"half": "up"}, "half must be"),
        ([p, p], {}, "appears twice"),
        ([p], {"lr": -1.0}, "lr must"),
        ([p], {"lr": float("nan")}, "lr must"),
        ([p], {"lr": torch.zeros(2)}, "one floating-point number"),
        ([p], {"lr": torch.tensor(1)}, "one floating-point number"),
        ([p], {"lr": torch.tensor(-1.0)}, "lr must"),
        ([p], {"lr": torch.zeros((), device="meta")}, "one floating-point number"),
        ([p], {"lr": "1e-3"}, "lr must be a finite number of at least 0, got '1e-3'"),
        ([p], {"lr": None}, "lr must"),
        ([p], {"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\)"),
        ([p], {"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\)"),
        ([p], {"betas": (0.9,)}, "two numbers"),
        ([p], {"betas": 0.9}, "two numbers, got 0.9"),
        ([p], {"betas": None}, "two numbers"),
        ([p], {"betas": ("a", 0.9)}, r"betas\[0\] must be in \[0, 1\), got 'a'"),
        ([p], {"weight_decay": -0.1}, "weight_decay must"),
        ([p], {"weight_decay": "0.1"}, "weight_decay must be a finite number"),
        ([p], {"fused": True}, "fused must be 'off', 'auto' or 'on', got True"),
        ([{"params": [p], "weight_dekay": 0.1}], {}, "has no option 'weight_dekay' for a group"),
        ([{"params": [p], "betas": 0.5}], {}, "two numbers"),
    ]
    for params, options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            cls(params, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="takes tensors, got int"):
        cls([3])
    for group in ([{"lr": 0.1}], [[p]]):
        with pytest.raises(TypeError, match=r"key 'params'|takes tensors|but got|argument 0"):
            cls(group)
    opt = cls([p], 0.1)
    for lr in (-1.0, "a", torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="lr must"):
            opt.set_lr(lr)
    with pytest.raises(ValueError, match="one floating-point number"):
        opt.set_lr(torch.zeros(2))
    with pytest.raises(TypeError, match="a dictionary with the key 'params'"):
        opt.add_param_group([p])
    with pytest.raises(ValueError, match="appears twice"):
        opt.add_param_group({"params": [torch.zeros(1), *[torch.ones(1)] * 2]})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.1
    for name, value, got in (
        ("grad_scale", 2.0, "2.0"),
        ("grad_scale", torch.ones(2), r"shape \(2,\)"),
        ("found_inf", False, "False"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a tensor of one element, got {got}"):
            opt.step(**{name: value})
    for limit in (-1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="max_norm must be at least 0"):
            opt.clip(limit)


def test_option_errors_of_single_optimizers():
    p = torch.zeros(3, requires_grad=True)
    for options in ({"a": 0.0}, {"b": -1.0}, {"bias_correction": "both"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            AdamATan2([p], **options)
    with pytest.raises(ValueError, match="eps"):
        AdamW([p], eps=-1.0)
    for options in ({"num_heads": 0}, {"num_heads": 2.0}, {"num_kv_heads": "2"}):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            AdamMini([p], **options)
    for options in ({"ns_steps": 0}, {"ns_steps": 2.5}, {"momentum": 1.0}, {"momentum": None}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            Muon([p], **options)
    with pytest.raises(ValueError, match="2 dimensions") as caught:
        SparseSignSGD([torch.zeros(3, 2), torch.zeros(3)])
    assert "\n" not in str(caught.value)


def test_a_refused_table_leaves_nothing():
    opt = SparseSignSGD([torch.zeros(3, 2)])
    with pytest.raises(ValueError, match="2 dimensions"):
        opt.add_param_group({"params": [torch.zeros(3)]})
    assert len(opt.param_groups) == len(opt._lr_tensors) == len(opt.state) == 1


@per_any
def test_schedulers_and_names_may_write_into_groups(cls):
    p = torch.zeros(3, requires_grad=True)
    opt = cls([{"params": [p], "name": "norms", "initial_lr": 0.1}], 0.1)
    assert opt.param_groups[0]["name"] == "norms"
    torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 0.5, last_epoch=3)


@per_any
def test_bad_gradients_are_named_before_anything_moves(cls):
    table = torch.nn.Embedding(5, 2, sparse=True)
    first = torch.ones(3, requires_grad=True)
    first.grad = torch.ones(3)
    opt = cls([first, table.weight], 0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="is sparse"):
        opt.step()
    assert (first == 1).all()


@per_any
@pytest.mark.parametrize("change", ["dtype", "size", "device"])
def test_a_model_changed_after_the_optimizer_was_made_is_named(cls, change):
    """The kernels go by addresses: they would read the old moments wrongly or past their end."""
    model = torch.nn.Linear(4, 3)
    named = [("q_proj.weight", model.weight), ("q_proj.bias", model.bias)]
    opt = cls(named, 0.1, **({"num_heads": 1} if cls is AdamMini else {}))
    if change == "dtype":
        model.double()
    elif change == "size":
        model.weight.data = torch.ones(5, 4)
    else:  # as after `model.cuda()`, the other way round
        kept = opt.state[model.weight]
        kept.update({name: value.to("meta") for name, value in kept.items()})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"\(., 4\) .*state.*before the optimizer") as info:
        opt.step()
    assert "\n" not in str(info.value)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_model_may_turn_half_after_the_optimizer_was_made():
    """Moments of float32 are what half precision keeps anyway."""
    model = torch.nn.Linear(4, 3)
    opt = AdamATan2(model.parameters(), 0.1)
    model.bfloat16()
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.detach().clone()
    opt.step()
    assert (model.weight != before).all()
