"""One rank of test_sharded.py: `python -m torch.distributed.run … sharded_cases.py`."""

from __future__ import annotations

import copy
import itertools
import os
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from optim import AdamATan2, AdamMini, AdamW, Muon, ShardedOptimizer

SIZES = {
    "tokens": (13, 96), "qkv": (96, 288), "o_proj": (288, 96), "gate_up": (96, 512),
    "down_proj": (512, 64), "q_head": (64, 7),
}  # fmt: skip
OPTIONS = {AdamMini: {"num_heads": 4}}


def model() -> nn.Module:
    """The same on every rank; names tell what is fused."""
    torch.manual_seed(0)
    layers = OrderedDict((name, nn.Linear(*size)) for name, size in SIZES.items())
    return nn.Sequential(layers).double()


def compare(cls: type, device: torch.device) -> None:
    """Twenty steps of whole batches beside the same steps, rows and state shared out."""
    options = OPTIONS.get(cls, {})
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(8, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.to(device)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    a, b = model().to(device), model().to(device)
    whole = cls(a.named_parameters(), lr=1e-3, **options)
    shared = ShardedOptimizer(b.named_parameters(), cls, lr=1e-3, **options)
    for step in range(20):
        a(x).square().sum().backward()
        norm, scale = whole.clip(1.0)
        whole.step(grad_scale=scale)
        whole.zero_grad()
        if step % 2:  # the backward reduces; else the step does
            shared.arm()
        b(x[mine]).square().sum().backward()
        other, scale = shared.clip(1.0)
        shared.step(grad_scale=scale)
        shared.zero_grad()
        assert torch.allclose(norm, other, rtol=1e-9)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12), cls.__name__
    everyone = [None] * world
    dist.all_gather_object(everyone, [q.detach().cpu().numpy().tobytes() for q in b.parameters()])
    assert all(other == everyone[0] for other in everyone)
    check_pieces(whole, shared, dict(zip(b.parameters(), a.parameters(), strict=True)))


def check_pieces(
    whole: torch.optim.Optimizer, shared: ShardedOptimizer, twins: dict[Tensor, Tensor]
) -> None:
    """Every tensor of this rank's state is named, all ranks' make up the whole; none has more than
    its share and 2 %."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cls, pieces = type(whole), shared.pieces()
    halves = [half for half in (shared.lead, shared.inner) if half is not None]
    own = [state for half in halves for state in half.state.values()]
    storages = {t.untyped_storage().data_ptr() for state in own for t in state.values()}
    assert storages == {piece.tensor.untyped_storage().data_ptr() for piece in pieces}
    names = {p: i for i, p in enumerate(twins)}
    mine = [(names[p.param], p.moment, p.tensor.cpu(), p.start, p.shape) for p in pieces]
    everyone = [None] * world
    dist.all_gather_object(everyone, mine)
    built = {}
    for number, moment, tensor, start, shape in itertools.chain(*everyone):
        place = built.setdefault((number, moment), torch.full(shape, torch.nan, dtype=tensor.dtype))
        first = 0 if start is None else start
        place.view(-1)[first : first + tensor.numel()] = tensor.view(-1)
    for (number, moment), tensor in built.items():
        theirs = whole.state[list(twins.values())[number]].pop(moment).cpu()
        assert torch.allclose(tensor, theirs, rtol=1e-9, atol=1e-12), (cls.__name__, moment)
    assert not any(whole.state.values())
    full = sum(t.numel() for t in built.values())
    kept = sum(piece.tensor.numel() for piece in pieces)
    assert kept <= full * (1 / world + 0.02), f"{cls.__name__}: {kept} of {full}"
    assert cls is not Muon or world < 4 or shared.lead is not None  # momenta without a matrix
    print(f"{cls.__name__} rank {rank}: {kept / full:.1%} of the state")


def compare_bits(cls: type, device: torch.device) -> None:
    """Float32, each rank with rows of its own: the bits of all-reduce and the whole optimizer.

    Two ranks add up two numbers, in whatever order; more may do so in another order, which is
    left out of account by gradients that are small integers. On a CPU torch's atan2 of the last
    few elements of a tensor, where it does not fill a vector, is another one than of the rest.
    """
    allowed = 1 if cls is AdamATan2 and device.type == "cpu" else 0  # ulp
    rank = dist.get_rank()
    a, b = model().to(device, torch.float32), model().to(device, torch.float32)
    options = OPTIONS.get(cls, {})
    whole = cls(a.named_parameters(), lr=1e-3, **options)
    shared = ShardedOptimizer(b.named_parameters(), cls, lr=1e-3, **options)
    generator = torch.Generator().manual_seed(rank)
    for step in range(10):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            grad = torch.randint(-9, 10, p.shape, generator=generator).to(device, p.dtype)
            p.grad = grad.clone()
            q.grad.copy_(grad)
            dist.all_reduce(p.grad)
        whole.step()
        shared.step()
        shared.zero_grad()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            apart = (p.detach().view(torch.int32) - q.detach().view(torch.int32)).abs().max()
            assert apart <= allowed, f"{cls.__name__}, step {step}: {int(apart)} ulp"
            q.data.copy_(p.detach())


def use_elsewhere(device: torch.device) -> None:
    """Without the application: a scheduler, groups, `model.zero_grad()`, a state to load."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(8, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, mine = x.to(device), slice(rank * 8 // world, (rank + 1) * 8 // world)
    for cls in (torch.optim.AdamW, torch.optim.SGD, AdamW):
        a, b = model().to(device), model().to(device)

        def groups(net: nn.Module) -> list[dict[str, object]]:
            matrices, vectors = ([p for p in net.parameters() if p.ndim == n] for n in (2, 1))
            return [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "lr": 1e-2}]

        whole = cls(groups(a), lr=1e-3)
        shared = ShardedOptimizer(groups(b), cls, lr=1e-3)
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (whole, shared)]
        for step in range(6):
            for net, optimizer, rows in ((a, whole, slice(None)), (b, shared, mine)):
                net(x[rows]).square().sum().backward()
                optimizer.step()
                net.zero_grad()  # to None, where it can
            for schedule in schedules:
                schedule.step()
            if step == 3:
                saved = copy.deepcopy(shared.state_dict())
                shared.load_state_dict(saved)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-12), cls.__name__
        for wrong in ({**saved, "world": world + 1}, {**saved, "rank": rank + 1}):
            try:
                shared.load_state_dict(wrong)
            except ValueError as error:
                assert "needed is that of rank" in str(error)
            else:
                raise AssertionError("loaded another rank's share")


def use_halves(device: torch.device) -> None:
    """Five equal matrices, for two to four ranks: groups of kinds and rates of their own, options
    changed and saved on the way, gradients averaged, a step held back."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = {**{f"fc{i}": (64, 96) for i in range(5)}, "norm": (96,)}
    rng = torch.Generator().manual_seed(2)
    start = {n: torch.randn(size, generator=rng, dtype=torch.float64) for n, size in sizes.items()}

    def groups() -> list[dict[str, object]]:
        own = [(n, p.clone().to(device).requires_grad_()) for n, p in start.items()]
        return [{"params": own[:5], "kind": "muon", "lr": 0.02, "momentum": 0.8},
                {"params": own[5:], "kind": "adam", "lr": 0.1}]  # fmt: skip

    one, two = groups(), groups()
    params = [[p for group in some for _, p in group["params"]] for some in (one, two)]
    pairs = list(zip(*params, strict=True))
    whole = Muon(one, lr=1e-3)
    shared = ShardedOptimizer(two, Muon, lr=1e-3, mean=True)
    moved = [run for bucket in shared._buckets for run in bucket.moved]
    assert moved and {run.rank for run in shared._buckets[0].homes} == set(range(world))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (whole, shared)]
    for step in range(8):
        for p, q in pairs:
            grads = torch.randn(world, *p.shape, generator=rng, dtype=p.dtype).to(device)
            p.grad, q.grad = grads.mean(0), grads[rank].clone()
        if step == 3:
            for optimizer in (whole, shared):
                optimizer.param_groups[0] |= {"momentum": 0.5, "weight_decay": 0.3}
        found = torch.tensor(float(step == 2), device=device)
        for optimizer in (whole, shared):
            optimizer.step(found_inf=found)
        for schedule in schedules:
            schedule.step()
        if step == 4:
            saved = copy.deepcopy(shared.state_dict())
            for optimizer in filter(None, (shared.lead, shared.inner)):
                for tensor in (t for state in optimizer.state.values() for t in state.values()):
                    tensor.fill_(7.0)
            shared.load_state_dict(saved)
        for p, q in pairs:
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-12), f"step {step}"
    check_pieces(whole, shared, {q: p for p, q in pairs})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = torch.device(sys.argv[1], int(os.environ["LOCAL_RANK"]))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    for kind in (AdamW, AdamATan2, AdamMini, Muon):
        compare(kind, place)
        compare_bits(kind, place)
    use_elsewhere(place)
    use_halves(place)
    dist.barrier()
    dist.destroy_process_group()
