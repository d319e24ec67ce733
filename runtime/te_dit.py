"""A DiT as it is written, with Transformer Engine's linear layers in its blocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from horsepower.quant import transformer_engine
from horsepower.quant.quantised import Values, plain
from horsepower.quant.scheme import Scheme
from horsepower.quant.transformer_engine import Learned
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.models.dit import Condition, DiT, Linear
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.presets import ModelName
from horsepower.runtime.source import Source


class TEDiT(DiT):
    """While it is `learning` its scales follow what it reads, from step to step; otherwise they never move."""

    def __init__(
        self,
        config: DiTConfig,
        weights: Values,
        device: torch.device,
        dtype: torch.dtype,
        scheme: Scheme,
        learned: Learned | None = None,
        learning: bool = False,
    ):
        """scheme: of a recipe. learned: what a twin of it learned, without which the recipe "delayed" can only learn.

        Weights are streamed: of those that are quantised one is on the device at a time as it was. Raises ValueError
        where the package is not there.
        """
        super().__init__(config, dtype, "meta")
        self._recipe, self.learning = transformer_engine.recipe_of(scheme), learning

        def weight(path: str) -> Tensor:
            name = f"{path}.weight"
            return plain(name, weights[name]).to(device)

        taken = transformer_engine.convert(self, Linear, weight, scheme, learned, learning)
        fill(self, weights, device, skip=tuple(taken))

    def velocity(self, video: Tensor, audio: Tensor, condition: Condition, frames: int) -> tuple[Tensor, Tensor]:
        """As `DiT.velocity`."""
        with transformer_engine.running(self._recipe, self.learning):
            return super().velocity(video, audio, condition, frames)

    def learned(self) -> Learned:
        """What its layers know by now."""
        return transformer_engine.learned_by(self)


class Scales:
    """What an engine's models learned, by their names: those of the recipe "delayed", which the others need not."""

    def __init__(self) -> None:
        self.known: dict[str, Learned] = {}
        self._learning: dict[str, Learned] | None = None

    @contextmanager
    def learning(self) -> Iterator[None]:
        """What models learn meanwhile takes the place of all before, unless an error ends it."""
        self._learning = {}
        try:
            yield
            self.known = self._learning
        finally:
            self._learning = None

    def keep(self, name: str, model: object) -> None:
        """Keep what a model knows if it is learning: it may have to give way before it is needed again."""
        if self._learning is not None:
            assert isinstance(model, TEDiT)
            self._learning[name] = model.learned()

    def check(self, scheme: Scheme | None, names: Sequence[str]) -> None:
        """Raises ValueError if one of these models has to learn first."""
        missing = [name for name in names if name not in self.known]
        if scheme is not None and scheme.recipe == "delayed" and missing:
            raise ValueError(
                f"scheme: got {scheme.name} before {missing[0]} was calibrated, allowed: after "
                "Engine.calibrate(requests) with requests that run it"
            )

    def model(self, name: ModelName, source: Source, device: torch.device, dtype: torch.dtype, scheme: Scheme) -> TEDiT:
        """A model with what it learned; one that is learning, if it is to, or cannot but."""
        known = (self.known if self._learning is None else self._learning).get(name)
        learning = scheme.recipe == "delayed" and (self._learning is not None or known is None)
        return TEDiT(source.config(name), source.weights(name), device, dtype, scheme, known, learning)
