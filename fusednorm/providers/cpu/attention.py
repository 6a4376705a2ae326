"""The native CPU provider of attention."""

import functools

from .. import native
from . import library

refusal = library.refusal
attention_fwd = functools.partial(native.attention_fwd, library)
attention_bwd = functools.partial(native.attention_bwd, library)
