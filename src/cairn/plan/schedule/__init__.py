"""Which instance of the fleet takes a request, and when: policies behind one interface. Pure: no I/O, no clock."""

from cairn.plan.schedule.base import Ask, Choice, InstanceView, Scheduler, Send, Shed, Wait
from cairn.plan.schedule.rehearsal import rehearse
from cairn.plan.schedule.simple import LeastLoaded, PrefixAware, RoundRobin
from cairn.plan.schedule.slo import SloAware, SloSettings
from cairn.plan.schedule.waiting import WaitingRoom

#: Schedulers by the name that a configuration gives them.
SCHEDULERS: dict[str, type[RoundRobin] | type[LeastLoaded] | type[PrefixAware] | type[SloAware]] = {
    one.name: one for one in (RoundRobin, LeastLoaded, PrefixAware, SloAware)
}

#: The one to use unless there is a reason for another.
DEFAULT_SCHEDULER = SloAware.name

__all__ = [
    "DEFAULT_SCHEDULER",
    "SCHEDULERS",
    "Ask",
    "Choice",
    "InstanceView",
    "LeastLoaded",
    "PrefixAware",
    "RoundRobin",
    "Scheduler",
    "Send",
    "Shed",
    "SloAware",
    "SloSettings",
    "Wait",
    "WaitingRoom",
    "rehearse",
]
