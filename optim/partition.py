"""What a parameter is, by its name and shape: what Muon and Adam-mini treat differently.

The blocks are those of Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More"
(arXiv:2406.16793, section 2.3): one second moment per token of embeddings and heads, per head of
queries and keys, per output neuron of values, projections and MLPs, per tensor of all else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from optim.checks import check_count
from optim.checks import warn as raise_warning

Rule = tuple[str, str, bool]

# (role, pattern of a part of the dotted name, whether any part may match or only the last).
# The first that matches decides; "weight" and "bias" are no parts.
RULES: tuple[Rule, ...] = (
    ("embedding", r"(.*_)?(embed(ding)?s?|embd|emb|tokens|positions|wte|wpe)(_.*)?", True),
    ("head", r"(.*_)?(head|classifier|unembed)|output|final_layer", False),
    ("qkv", r"(.*_)?(qkv|wqkv|c_attn|query_key_value|in_proj)(_.*)?", False),
    ("gate_up", r"(.*_)?(gate_up|up_gate|w12)(_.*)?", False),
    ("query", r"(.*_)?(q|query|wq)(_proj)?", False),
    ("key", r"(.*_)?(k|key|wk)(_proj)?", False),
    ("value", r"(.*_)?(v|value|wv)(_proj)?", False),
    ("projection", r"(o|wo|out|proj|c_proj|dense)(_proj)?", False),
    ("mlp", r"(gate|up|down|w1|w2|w3|fc\d*|c_fc|linear\d*|dense_\w+)(_proj)?", False),
    ("mlp", r"(.*_)?(mlp|ffn|feed_?forward|linear)(_.*)?", True),
)
PIECES = {"qkv": 3, "gate_up": 2}  # matrices stacked along the rows of one parameter

BlockKind = Literal["token", "head", "neuron", "tensor"]
_KINDS: dict[str, BlockKind] = {
    **dict.fromkeys(("embedding", "head"), "token"),
    **dict.fromkeys(("qkv", "query", "key"), "head"),
    **dict.fromkeys(("value", "projection", "mlp", "gate_up"), "neuron"),
}


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks of one size, in the row-major order of a parameter."""

    kind: BlockKind
    blocks: int
    size: int  # elements of a block


@dataclass(frozen=True)
class Part:
    """One parameter, its role, and the blocks that share a second moment in Adam-mini.

    The role is one of `RULES`, "vector" (fewer than 2 dimensions that are longer than 1), or
    "other" where no rule matched.
    """

    name: str
    param: Tensor
    role: str
    segments: tuple[Segment, ...]

    @property
    def pieces(self) -> int:
        """How many equally shaped matrices lie in it, along the rows."""
        pieces = PIECES.get(self.role, 1)
        return pieces if self.param.shape[0] % pieces == 0 else 1

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return sum(s.blocks for s in self.segments)


class Partition(list[Part]):
    """The parts of a model, in order; `print(partition)` shows them as a table."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "role", "blocks", "of elements")]
        for part in self:
            kinds = " + ".join(f"{s.blocks} {s.kind}" for s in part.segments) or "0"
            sizes = " + ".join(str(s.size) for s in part.segments)
            shape = "×".join(map(str, part.param.shape)) or "scalar"
            rows.append((part.name or "(no name)", shape, part.role, kinds, sizes))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
        return "\n".join(line.rstrip() for line in lines)


def role_of(name: str, param: Tensor, rules: Sequence[Rule] = RULES) -> str:
    """The role of one parameter, see `Part`."""
    if sum(n > 1 for n in param.shape) < 2:
        return "vector"
    parts = [part for part in name.split(".") if part not in ("weight", "bias")] or [""]
    for role, pattern, anywhere in rules:
        if any(re.fullmatch(pattern, part) for part in (parts if anywhere else parts[-1:])):
            return role
    return "other"


def segments_of(
    role: str, shape: Sequence[int], num_heads: int | None, num_kv_heads: int | None
) -> tuple[Segment, ...] | None:
    """The blocks of a parameter of this role; None where its rows do not fit the heads.

    A fused qkv holds the rows of all queries, then all keys, then all values.
    """
    numel = 1
    for n in shape:
        numel *= n
    if numel == 0:
        return ()
    kind = _KINDS.get(role, "tensor")
    if kind == "tensor":
        return (Segment("tensor", 1, numel),)
    rows, columns = shape[0], numel // shape[0]
    if kind != "head":
        return (Segment(kind, rows, columns),)
    if num_heads is None:
        return None
    kv = num_kv_heads or num_heads
    heads = {"qkv": num_heads + 2 * kv, "query": num_heads, "key": kv}[role]
    if rows % heads:
        return None
    width = rows // heads
    if role != "qkv":
        return (Segment("head", heads, width * columns),)
    return (
        Segment("head", num_heads, width * columns),
        Segment("head", kv, width * columns),
        Segment("neuron", kv * width, columns),
    )


def partition_parameters(
    named_parameters: Iterable[tuple[str, Tensor]],
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    *,
    rules: Sequence[Rule] = (),
    warn: bool = True,
) -> Partition:
    """Every parameter with its role and its blocks, in the given order; print it to read it.

    Args:
        named_parameters: as of `module.named_parameters()`.
        num_heads: attention heads of queries; needed where there are queries and keys.
        num_kv_heads: heads of keys and values, where there are fewer.
        rules: go before `RULES`, in the same form.
        warn: whether to warn (once, with all names) of matrices that no rule knows, and of queries
            and keys that cannot be cut into heads; such a parameter is one block.

    Raises:
        ValueError: if a parameter comes twice, heads cannot be counted, or a rule has not the form
            of `RULES`.
        TypeError: for anything but pairs of a name and a tensor.
    """
    for option, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if heads is not None:
            check_count(option, heads)
    check_rules(rules)
    parts, unknown, headless = Partition(), [], []
    for item in named_parameters:
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], Tensor)):
            raise TypeError(f"needed are (name, tensor) pairs, got {type(item).__name__}")
        name, p = item
        if not isinstance(name, str):
            raise TypeError(f"the name of a parameter must be a string, got {name!r}")
        role = role_of(name, p, (*rules, *RULES))
        segments = segments_of(role, p.shape, num_heads, num_kv_heads)
        if segments is None:
            headless.append(name)
            segments = segments_of("other", p.shape, None, None)
        if role == "other":
            unknown.append(name or f"(no name, shape {tuple(p.shape)})")
        parts.append(Part(name, p, role, segments))
    if len({id(part.param) for part in parts}) != len(parts):
        raise ValueError("a parameter appears twice")
    if warn and unknown:
        raise_warning(
            f"no rule of optim.partition knows {_few(unknown)}: each is one block with one second "
            "moment; name the parameters, or give a rule for them"
        )
    if warn and headless:
        heads = "num_heads is not given" if num_heads is None else f"they do not fit {num_heads}"
        heads += f" and {num_kv_heads} heads" if num_heads and num_kv_heads else ""
        heads += " heads" if num_heads and not num_kv_heads else ""
        raise_warning(
            f"{_few(headless)} cannot be cut into heads, since {heads}: each is one block"
        )
    return parts


def check_rules(rules: Sequence[Rule]) -> None:
    """Raise ValueError for a rule that is not a role, a regular expression and a truth value."""
    for rule in rules:
        _check_rule(rule)


def _check_rule(rule: Rule) -> None:
    if not isinstance(rule, (tuple, list)) or len(rule) != 3:
        raise ValueError(f"a rule must be (role, pattern, anywhere), got {rule!r}")
    role, pattern, _ = rule
    roles = {role for role, *_ in RULES} | {"vector", "other"}
    if role not in roles:
        raise ValueError(f"a rule's role must be one of {', '.join(sorted(roles))}, got {role!r}")
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"a rule's pattern {pattern!r} is no regular expression: {error}"
        ) from None


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
