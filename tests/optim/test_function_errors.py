"""Wrong arguments of what is not an optimizer: one sentence each, and nothing happens."""

import pytest
import torch

from optim import EMA, AdamMini, SparseSignSGD, clip_grad_norm, newton_schulz, partition_parameters

MATRIX = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("matrix", "options", "kind", "message"),
    [
        ([[1.0]], {}, TypeError, "takes a tensor, got list"),
        (torch.ones(3), {}, ValueError, r"at least 2 dimensions, got shape \(3,\)"),
        (MATRIX.to_sparse(), {}, ValueError, "must be dense, got layout torch.sparse_coo"),
        (MATRIX.long(), {}, ValueError, "the matrix must be of real floating-point"),
        (MATRIX.to(torch.complex64), {}, ValueError, "the matrix must be of real floating-point"),
        (MATRIX, {"dtype": torch.int32}, ValueError, "dtype must be of real floating-point"),
        (MATRIX, {"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        (MATRIX, {"steps": "5"}, ValueError, "steps must be an integer of at least 1, got '5'"),
        (MATRIX, {"steps": 2.5}, ValueError, "steps must be an integer of at least 1, got 2.5"),
        (MATRIX, {"coefficients": "cubic"}, ValueError, "coefficients must be one of .*'cubic'"),
        (MATRIX, {"fused": "maybe"}, ValueError, "fused must be .* got 'maybe'"),
    ],
)
def test_newton_schulz(matrix, options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        newton_schulz(matrix, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 4)])
def test_newton_schulz_of_nothing_is_nothing(shape):
    assert newton_schulz(torch.ones(shape)).shape == shape


def test_average():
    with pytest.raises(TypeError, match="EMA takes tensors, got int"):
        EMA([3])
    with pytest.raises(ValueError, match=r"EMA rate must be in \[0, 1\], got 'a'"):
        EMA([MATRIX], "a")
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch.int8"):
        EMA([MATRIX], dtype=torch.int8)
    assert list(EMA(MATRIX).shadow) == ["0"]  # one tensor, not its rows
    foreign = torch.optim.SGD([MATRIX.clone().requires_grad_()], 0.1)
    with pytest.raises(TypeError, match="optimizers of this package, got SGD"):
        EMA([MATRIX]).attach(foreign)
    assert not hasattr(foreign, "ema")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("mlp",), r"a rule must be \(role, pattern, anywhere\)"),
        ("mlp", r"a rule must be \(role, pattern, anywhere\)"),
        (("mpl", "a", False), "role must be one of .*mlp.*, got 'mpl'"),
        (("mlp", "(", False), r"pattern '\(' is no regular expression"),
        (("mlp", 3, False), "pattern 3 is no regular expression"),
    ],
)
def test_rules_of_a_partition(rule, message):
    with pytest.raises(ValueError, match=message) as caught:
        partition_parameters([("q", MATRIX)], rules=(rule,))
    assert "\n" not in str(caught.value)


def test_names_of_a_partition():
    with pytest.raises(TypeError, match="must be a string, got 3"):
        partition_parameters([(3, MATRIX)])
    for item in (MATRIX, ("w", 3), ("w",)):
        with pytest.raises(TypeError, match=r"needed are \(name, tensor\) pairs"):
            partition_parameters([item])
    for heads in (0, 2.0, "2", True):
        with pytest.raises(ValueError, match="num_heads must be an integer of at least 1"):
            partition_parameters([("w", MATRIX)], heads)
    with pytest.raises(ValueError, match="role must be one of"):
        AdamMini([("w", MATRIX)], rules=[("mpl", "x", True)])


def test_clipping():
    assert clip_grad_norm([], 1.0) == 0
    with pytest.raises(TypeError, match="of tensors, got int"):
        clip_grad_norm([3], 1.0)
    for limit in (-1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="max_norm must be at least 0"):
            clip_grad_norm([MATRIX], limit)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([1], torch.ones(1, 4), "ids must be a tensor, got list"),
        (torch.tensor([1]), None, "row_grads must be a tensor, got NoneType"),
        (torch.tensor([1.0]), torch.ones(1, 4), "ids must be int32 or int64, got torch.float32"),
        (torch.tensor([10]), torch.ones(1, 4), "id 10 is outside a table of 10 rows"),
        (torch.tensor([1]), torch.ones(1, 3), r"row_grads must have shape \(1, 4\)"),
    ],
)
def test_rows(ids, rows, message):
    table = torch.zeros(10, 4)
    opt = SparseSignSGD([table])
    with pytest.raises((TypeError, ValueError), match=message):
        opt.add_rows(table, ids, rows)
    opt.step()
    assert not table.any()
