"""ADM's Inception network in TensorFlow: the frozen graph itself, by its tensor names."""

import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from . import ranks
from .errors import UserError

SPATIAL_CHANNELS = 7
POOL, SPATIAL, LOGITS = "pool_3:0", "mixed_6/conv:0", "softmax/logits/MatMul"


def import_tensorflow():
    """TensorFlow, without the lines that it writes to the terminal before its own log levels count."""
    with suppress(ImportError):
        importlib.import_module("triton")  # after TensorFlow, its import (by timm or torchvision) ends the process
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        import tensorflow

        return tensorflow
    except ImportError as error:
        raise UserError("the tensorflow backend needs TensorFlow: pip install tensorflow") from error
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def create_session(graph, gpu=None):
    """A session of a graph. :param gpu: number of the one GPU to take; None is all that TensorFlow sees."""
    tf = import_tensorflow()
    visible = "" if gpu is None or not tf.config.list_physical_devices("GPU") else str(gpu)
    options = tf.compat.v1.GPUOptions(allow_growth=True, visible_device_list=visible)
    return tf.compat.v1.Session(graph=graph, config=tf.compat.v1.ConfigProto(gpu_options=options))


class TensorFlowInception:
    """Features of images from a frozen graph with ADM's names, on the GPU where TensorFlow sees one.

    :param path: `classify_image_graph_def.pb`. :param gpu: number of the one GPU to take; None is all that it sees.
    :raises UserError: when TensorFlow is missing, or the file is no graph or lacks one of the names.
    """

    name = "tensorflow"

    def __init__(self, path, gpu=None):
        tf = import_tensorflow()
        graph = tf.Graph()
        try:
            definition = tf.compat.v1.GraphDef.FromString(Path(path).read_bytes())
            with graph.as_default():
                self._images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
                pool, spatial, product = tf.import_graph_def(
                    definition, {"ExpandDims:0": self._images}, [POOL, SPATIAL, LOGITS], name="inception"
                )
                weights = product.inputs[1]  # the published scores leave the bias out
                height, width = spatial.shape[1:3]
                self.sizes = {"pool": weights.shape[0], "spatial": height * width * SPATIAL_CHANNELS}
                pool = tf.reshape(pool, [-1, weights.shape[0]])
                spatial = tf.reshape(spatial[..., :SPATIAL_CHANNELS], [tf.shape(spatial)[0], -1])
                self._features = {"pool": pool, "spatial": spatial, "logits": tf.matmul(pool, weights)}
        except FileNotFoundError:
            raise
        except Exception as error:  # protobuf's DecodeError is no ValueError
            raise UserError(f"{path} is not the Inception graph of 2015 ({error}): fetch it anew") from error
        self._session, self._gpu = create_session(graph, gpu), gpu
        self.logit_weights = self._session.run(weights)

    @property
    def device_name(self):
        """What TensorFlow runs on."""
        tf = import_tensorflow()
        gpus = tf.config.list_physical_devices("GPU")
        if not gpus:
            return ranks.processor()
        return tf.config.experimental.get_device_details(gpus[self._gpu or 0]).get("device_name", "GPU")

    def __call__(self, images):
        """(N, H, W, 3) uint8 images -> pool (N, 2048), spatial (N, 2023) and logits (N, 1008), float32 arrays."""
        return self._session.run(self._features, {self._images: images.astype(np.float32)})
