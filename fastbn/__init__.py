"""Fast, accurate batch normalization for NumPy arrays on the CPU."""

from fastbn._runtime import get_num_threads, num_threads, set_num_threads, show_config
from fastbn._shift import Shift, shift
from fastbn._version import __version__
from fastbn.functional import batch_norm, batch_norm_backward, denormalize, moments, normalize
from fastbn.layer import BatchNorm
from fastbn.running import RunningMoments
from fastbn.statistics import Moments

__all__ = [
    "BatchNorm",
    "Moments",
    "RunningMoments",
    "Shift",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "denormalize",
    "get_num_threads",
    "moments",
    "normalize",
    "num_threads",
    "set_num_threads",
    "shift",
    "show_config",
]
