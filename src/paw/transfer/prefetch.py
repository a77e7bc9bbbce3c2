"""Pairs of modules with what is known of them, some read and decomposed ahead of the one in
work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from paw.errors import TransferError
from paw.models.adapters import Factors
from paw.models.layout import heads
from paw.models.load import load_tokenizer
from paw.models.tensors import Weights
from paw.store import Input
from paw.transfer.evidence import Evidence
from paw.transfer.methods import Method, method_named
from paw.transfer.modules import Names, by_layer, layer_of
from paw.transfer.pairing import Pair, Side, Site

if TYPE_CHECKING:
    from paw.transfer.transfer import TransferStage

EMBEDDINGS = "model.embed_tokens"


def ahead(pairs: Iterator[Pair], workers: int) -> Iterator[Pair]:
    """The same pairs in the same order, `workers` of them read and decomposed in threads."""
    waiting: deque[Future[Pair]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for pair in pairs:
            waiting.append(pool.submit(_ready, pair))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _ready(pair: Pair) -> Pair:
    _ = pair.source.basis, pair.target.basis
    return pair


def module_pairs(
    adapter: Mapping[str, Factors],
    names: Names,
    known: Evidence,
    config: TransferStage,
    inputs: Mapping[str, Input],
) -> Iterator[Pair]:
    """Pairs with what was seen of them on text.

    Raises:
        TransferError: where a method looks at embeddings, and a model has none.
    """
    c, models = config.transfer, (inputs["source"], inputs["target"])
    source, target = (Weights(model.path, config.runtime.device) for model in models)
    of_source, of_target = _sides(source, models[0], config), _sides(target, models[1], config)
    residual = _residual((source, target), models, config) if c.evidence == "embeddings" else None
    attention = (heads(models[0].path), heads(models[1].path))
    asked = dict.fromkeys(names)
    looked_at = asked | dict.fromkeys(_beside(names, c.method, source, target))
    for group, sites in known.groups(list(looked_at)):
        for name_s, name_t in (pair for pair in group if pair in asked):
            layers = (layer_of(name_s)[0], layer_of(name_t)[0])
            shared = {t[1]: site for (s, t), site in sites.items() if (s[0], t[0]) == layers}
            sides, moved = (of_source(name_s), of_target(name_t)), adapter[name_s]
            yield Pair(*sides, shared, c.basis, attention, residual, moved)


def _beside(
    names: Names, method: str, source: Weights, target: Weights
) -> Iterator[tuple[str, str]]:
    """Modules of the same layers that a method looks at, whether the adapter holds them or not."""
    found = method_named(method)
    roles = found.also if isinstance(found, Method) else ()
    of_s, of_t = by_layer(source.shapes), by_layer(target.shapes)
    for s, t in dict.fromkeys((layer_of(s)[0], layer_of(t)[0]) for s, t in names):
        yield from ((of_s[s][role], of_t[t][role]) for role in roles)


def _sides(weights: Weights, model: Input, config: TransferStage) -> Callable[[str], Side]:
    """Modules of one model by name; weights and bases are found when asked for."""
    from paw.transfer.bases import Bases

    bases, device = Bases(config.bases, model.fingerprint), config.runtime.device

    def side(name: str) -> Side:
        read, shape = partial(weights.__getitem__, name), weights.shapes[name]
        return Side(name, shape, read, lambda k: bases.of(name, shape, k, read, device))

    return side


def _residual(
    weights: tuple[Weights, Weights], models: tuple[Input, Input], config: TransferStage
) -> Site:
    from paw.data.vocabulary import shared_tokens
    from paw.transfer.anchors import embedding_site

    for each, model in zip(weights, models, strict=True):
        if EMBEDDINGS not in each.shapes:
            raise TransferError(
                f"{model.path}: has no {EMBEDDINGS}, which transfer=embedding looks at. Use "
                "another method."
            )
    source, target = (
        load_tokenizer(model.path, trust) for model, trust in zip(models, config.trust, strict=True)
    )
    return embedding_site(
        weights[0][EMBEDDINGS], weights[1][EMBEDDINGS], shared_tokens(source, target)
    )
