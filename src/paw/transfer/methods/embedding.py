"""The residual streams aligned by the embeddings of shared tokens: T = polar(E_sᵀ Ω E_t), centred,
every token of weight 1/(‖e_s‖‖e_t‖). No text is run.

Inner spaces follow from the weights: what leaves q, k, v, gate and up by polar(W_s T W_tᵀ), which
is what embeddings sent through both would show, and what enters o and down by polar(W_sᵀ T W_t), so
that both write the same to the stream.
"""

from __future__ import annotations

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig


def maps(pair: Pair, config: TransferConfig) -> Maps:
    from paw.transfer.linalg import polar

    assert pair.residual is not None, "the stage gives it to methods whose evidence is embeddings"
    stream, w_s, w_t = pair.residual.procrustes, pair.source.weight, pair.target.weight
    if pair.role.onto_stream:
        return Maps(Product((polar(w_s.T @ stream @ w_t),)), Product((stream.T,)))
    return Maps(Product((stream,)), Product((polar(w_s @ stream @ w_t.T).T,)))


METHOD = Method(maps)
