from collections.abc import Sequence

from torch import Tensor

def names() -> list[str]: ...

class Layer:
    def __init__(
        self,
        isa: str,
        directions: Sequence[Sequence[Tensor | None]],
        storages: Sequence[str],
        clips: Sequence[float],
        /,
    ) -> None: ...
    def run(
        self,
        x: int,
        sizes: int,
        steps: int,
        batch: int,
        rows: int,
        h0: int,
        c0: int,
        output: int,
        h: int,
        c: int,
        thoroughly: bool,
        threads: int,
        /,
    ) -> bool: ...
