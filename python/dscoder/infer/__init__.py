"""Generation from a model: requests in, text and tokens out; knows nothing of training."""

from dscoder.infer.engine import Engine
from dscoder.infer.infill import infill_request, text_request
from dscoder.infer.request import Completion, Event, Request

__all__ = ["Completion", "Engine", "Event", "Request", "infill_request", "text_request"]
