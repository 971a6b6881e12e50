"""One operation to be divided over a mesh, with the dimensions of its operands and results."""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping, Sequence

import jax

from jax_fa3.options import AttentionOptions

Results = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """A forward or backward operation, with the dimensions of its operands and results.

    local(sequence, *operands) is what one device does; `sequence` has the bound mesh axes over
    which query and key rows are split, none where it has all of them.
    """

    options: AttentionOptions
    local: Callable[..., Results]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    needs_whole: str | None  # what keeps sequences from staying split, if anything does
    heads_meet: bool = True  # query heads those of key and value; else each goes its own way
    are_shares: bool = False  # of a result that devices have whole each gives a share, as of a sum
    heads_alike: bool = False  # query heads are split no further than those of key and value
    # Dimensions that must not arrive split, and what to say of the mesh axes where one does.
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_plain_xla(self) -> bool:
        """Whether it is ordinary code to XLA, in both directions."""
        return set(self.options.routes) == {"xla"}

    @property
    def batch(self) -> str:
        """The letters of the mapped axes, which lead in all operands that have them, and of the
        batch, if there is one."""
        mapped = "".join(filter(str.isupper, self.operands[0]))
        return mapped + "b" if any("b" in dims for dims in self.operands) else mapped

    def mapped(self, are_mapped: Sequence[bool]) -> Operation:
        """The operation with one more leading axis, of those operands that are mapped."""
        letter = string.ascii_uppercase[len(self.batch) - 1]
        axes = tuple(0 if is_mapped else None for is_mapped in are_mapped)

        def local(sequence, *operands):
            return jax.vmap(functools.partial(self.local, sequence), in_axes=axes)(*operands)

        return dataclasses.replace(
            self,
            local=local,
            operands=tuple(
                letter + dims if is_mapped else dims
                for dims, is_mapped in zip(self.operands, are_mapped, strict=True)
            ),
            results=tuple(letter + dims for dims in self.results),
        )

    def extents(self, operands: Sequence[jax.Array]) -> dict[str, int]:
        """The extent of each dimension."""
        pairs = zip(self.operands, operands, strict=True)
        return {letter: n for dims, x in pairs for letter, n in zip(dims, x.shape, strict=True)}
