"""ADM's distances in TensorFlow: the operations of its graph, tile by tile, so that not one neighbour differs."""

import torch

from .inception_tensorflow import create_session, import_tensorflow
from .neighbours import Rule


def _squared_distances(tf, u, v):
    """(n, d) and (m, d) -> (n, m), in their own precision.

    Each operation rounds: another order, or norms in single precision, gives other neighbours in half precision.
    """
    norms_u, norms_v = (tf.reduce_sum(tf.square(x), 1) for x in (u, v))
    products = tf.matmul(u, v, transpose_b=True)
    return tf.maximum(norms_u[:, None] - 2 * products + norms_v[None, :], 0.0)


class TensorFlowDistances:
    """Squared distances by ADM's rule: in half precision where all of the tile is finite in it, else in single.

    :param gpu: number of the one GPU to take; None is all that TensorFlow sees.
    """

    def __init__(self, gpu=None):
        tf = import_tensorflow()
        graph = tf.Graph()
        with graph.as_default():
            self._u, self._v = (tf.compat.v1.placeholder(tf.float32, [None, None]) for _ in range(2))
            half = _squared_distances(tf, tf.cast(self._u, tf.float16), tf.cast(self._v, tf.float16))
            self._distances = tf.cond(
                tf.reduce_all(tf.math.is_finite(half)),
                lambda: tf.cast(half, tf.float32),
                lambda: _squared_distances(tf, self._u, self._v),
            )
        self._session = create_session(graph, gpu)

    def __call__(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(n, d) and (m, d) float32 -> (n, m) float32, on u's device."""
        tiles = {self._u: u.cpu().numpy(), self._v: v.cpu().numpy()}
        return torch.from_numpy(self._session.run(self._distances, tiles)).to(u.device)


def adm_rule(gpu=None) -> Rule:
    """The rule of ADM's evaluator, on the device that TensorFlow runs on."""
    text = "half precision where a tile is finite in it, by the operations of ADM's graph in TensorFlow"
    return Rule(text, TensorFlowDistances(gpu))
