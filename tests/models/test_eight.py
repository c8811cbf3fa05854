"""8-bit products with fused epilogues on Hopper: against float64 of the same 8-bit factors."""

import pytest
import torch
import torch.nn.functional as F

from models import ARCHITECTURES, ModelDims, build_model, fp8, kernels
from models.kernels import eight as operations
from models.kernels import hopper
from models.kernels.hopper import attention_long, eight
from models.layers import RotaryTable


def _hopper() -> bool:
    return torch.cuda.is_available() and hopper.available(torch.cuda.current_device())


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _hopper(), reason="needs a Hopper GPU")]

SUM = 1.2e-2  # error of a sum of about unit variance: 2⁻¹⁴ of up to 5, some 40 times
ROWS = (1, 63, 129, 1000, 8193)
# (features in, features out): W at rest or streamed, tiles of 128 and 256 columns
SHAPES = ((128, 128), (512, 512), (512, 1536), (128, 384), (1536, 512), (640, 256), (256, 1024))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def factors(rows: int, k: int, n: int) -> tuple[torch.Tensor, ...]:
    """x and W in 8 bits, W's unit, and their product in float64."""
    x = draw(rows, k).to(eight.E4M3)
    w, unit = fp8.quantize(torch.randn(n, k, device="cuda") * k**-0.5)
    return x, w, unit, x.double() @ w.double().T * unit.double()


def close(actual: torch.Tensor, expected: torch.Tensor, roundings: int = 1) -> None:
    """Rounded to bfloat16 (2⁻⁸ of a value) after sums that keep some 14 bits of their largest."""
    torch.testing.assert_close(actual.double(), expected, rtol=roundings * 2**-8, atol=SUM)
    assert (actual.double() - expected).norm() < 4e-3 * expected.norm()


def close_in_eight(
    actual: torch.Tensor, expected: torch.Tensor, slack: torch.Tensor | float = 0.0
) -> None:
    """Rounded to e4m3: 2⁻⁴ of a value, or half of 2⁻⁹; what is beyond 448 is 448."""
    assert actual.dtype == eight.E4M3
    error = (actual.double() - expected.clamp(-448, 448)).abs()
    assert (error <= 0.065 * expected.abs() + 2e-3 + slack).all()
    assert error.norm() <= 0.03 * expected.clamp(-448, 448).norm()


def norm(v: torch.Tensor) -> torch.Tensor:
    return v * (v.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_and_norm(rows, shape):
    x, w, unit, product = factors(rows, *shape)
    close(eight.linear(x, w, unit), product)
    if shape[1] not in hopper.NORM_WIDTHS:
        return
    r, scales = draw(rows, shape[1]), torch.rand(rows, device="cuda") + 0.5
    for by in (None, scales):
        v = r.double() + (product if by is None else product * by.double()[:, None])
        out, none = eight.linear_residual_norm(x, w, unit, r, 1e-5, by)
        close(out, norm(v), roundings=2)
        assert none is None
        same, small = eight.linear_residual_norm(x, w, unit, r, 1e-5, by, again=True)
        assert torch.equal(same, out)
        close_in_eight(small, norm(v), SUM)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_of_wide_factors_in_eight(rows, shape):
    k, n = shape
    if n not in hopper.NORM_WIDTHS:
        n = 512
    x, w, r = draw(rows, k), draw(n, k, scale=k**-0.5), draw(rows, n)
    out, small = eight.linear_residual_norm(x, w, None, r, 1e-5, again=True)
    assert torch.equal(out, hopper.linear_residual_norm(x, w, r, 1e-5, save=False)[0])
    close_in_eight(small, norm(r.double() + x.double() @ w.double().T))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", ((128, 128), (512, 1536), (128, 384), (1024, 384)))
@pytest.mark.parametrize("scale", (1.0, 30.0))
def test_swiglu(rows, shape, scale):
    k, inner = shape
    x, w, unit, product = factors(rows, k, 2 * inner)
    gate, up = (product * scale).chunk(2, dim=-1)
    h, none = eight.linear_swiglu(x, w, unit * scale, squares=False)
    assert none is None
    # of the sigmoid; of gate and up themselves
    slack = 3e-4 * (gate * up).abs() + 1.1 * SUM * scale * (gate.abs() + up.abs())
    close_in_eight(h, F.silu(gate) * up, slack)
    same, parts = eight.linear_swiglu(x, w, unit * scale, squares=True)
    assert torch.equal(same.view(torch.uint8), h.view(torch.uint8))
    rtol = 2e-3 if k <= 512 else 1e-2  # where W streams, of gate and up rounded to bfloat16
    expected = (gate * up).square().sum(-1)
    torch.testing.assert_close(parts.sum(0).double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("length", (129, 916))
@pytest.mark.parametrize("rotated", (True, False))
def test_rotary(length, rotated):
    x, w, unit, product = factors(3 * length, 512, 1536)
    table = RotaryTable(64, torch.arange(length), 10000.0).cuda()
    angles = (table.cos, table.sin) if rotated else (None, None)
    out = eight.linear_rotary(x.view(3, length, 512), w, unit, *angles, attention_long.SCALE)
    q, k, v = product.view(3, length, 3, 8, 64).unbind(2)
    table = table.double()
    if rotated:
        q, k = table(q), table(k)
    close(out.view(3, length, 3, 8, 64), torch.stack((q * attention_long.SCALE, k, v), 2))


@pytest.mark.parametrize("size", ((0, 4, 128), (1, 1, 128), (3, 97, 512)))
def test_states_in_eight(size):
    x, other = draw(*size), draw(*size, scale=300)
    close_in_eight(operations.to_eight(other), other.double())
    total, small = operations.sum_in_eight(x, other)
    assert torch.equal(total, x + other)
    close_in_eight(small, total.double())


@pytest.mark.parametrize("name", ("trm", "hrm"))
@pytest.mark.parametrize("mixer", ("attention", "mlp"))
@pytest.mark.parametrize("length", (81, 300))
@pytest.mark.parametrize("within", ("none", "product"))
def test_model(monkeypatch, name, mixer, length, within):
    """A model's fused 8-bit phases: close to bfloat16, the same in evaluation, in a graph."""
    if mixer == "mlp" and (name == "hrm" or length == 300):
        pytest.skip("no such model, or no fused mixer")
    options = {} if name == "hrm" else {"mixer": mixer}
    if mixer == "mlp":
        options["pos_encodings"] = "none"
    config = ARCHITECTURES[name](hidden_size=256, num_heads=4, puzzle_emb_ndim=256, fp8=True,
                                 glu_norm=within, **options)  # fmt: skip
    dims, device = ModelDims(length, 11, 1), torch.device("cuda")
    model = build_model(config, dims, seed=0, device=device)
    wide = build_model(config.model_copy(update={"fp8": False}), dims, seed=0, device=device)
    rows = torch.randn(5, 256, device=device)
    batch = {"inputs": torch.randint(0, 11, (5, length), device=device), "puzzle_rows": rows}
    batch["puzzle_ids"] = torch.zeros(5, dtype=torch.int32, device=device)
    asked = []
    forward = type(model.levels["L"])._forward_eight

    def counted(self, *arguments):
        asked.append(1)
        return forward(self, *arguments)

    type(model.levels["L"])._forward_eight = counted
    products = []
    turned = operations.turned_qkv
    monkeypatch.setattr(operations, "turned_qkv", lambda *a: (products.append(1), turned(*a))[1])
    try:
        trained = model(model.init_state(5), batch)
        assert asked and bool(products) == (mixer == "attention" and length == 300)
        trained.logits.float().sum().backward()
        with torch.no_grad():
            evaluated = model.eval()(model.init_state(5), batch)
        # some kernels sum in another order where they keep nothing for a backward pass
        torch.testing.assert_close(evaluated.logits, trained.logits, rtol=2**-7, atol=2e-3)
        kernels.switch_off()
        before = len(asked)
        plain = model(model.init_state(5), batch)
        assert len(asked) == before
    finally:
        kernels.switch_on()
        type(model.levels["L"])._forward_eight = forward
    expected = wide(wide.init_state(5), batch).logits.double()
    error, of_plain = (
        (logits.double() - expected).norm() / expected.norm()
        for logits in (trained.logits, plain.logits)
    )
    assert 0 < error < 1.5 * of_plain + 0.05  # what 8 bits do to it without fused kernels
