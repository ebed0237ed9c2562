"""Where the autopilot's decisions can be seen: counted, in the log at debug, and as spans of the request's trace."""

import logging
import math

from cairn.observe.metrics import Metrics
from cairn.observe.trace import begin

logger = logging.getLogger(__name__)


def record(metrics: Metrics, kind: str, choice: str, reason: str, **facts: float) -> None:
    """Tells of one decision. The request's id and its trace are those of this thread or task (`serving`).

    facts: by which it was made; those that are NaN are not known, and left out.
    """
    metrics.decisions.add(1, kind=kind, choice=choice, reason=reason)
    debug = logger.isEnabledFor(logging.DEBUG)
    with begin("cairn.decide") as span:
        if debug or span.on:
            fields: dict[str, str | float] = {"kind": kind, "choice": choice, "reason": reason}
            fields |= {name: fact for name, fact in facts.items() if not math.isnan(fact)}
            span.note(**fields)
            if debug:
                logger.debug("%s: %s (%s)", kind, choice, reason, extra={"fields": fields})
