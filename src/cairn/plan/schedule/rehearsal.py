"""A scheduler's kernels, run before anybody waits for them: the first call of one compiles it, for seconds."""

from cairn.plan.role import Role
from cairn.plan.schedule.base import Ask, InstanceView, Scheduler, Send


def rehearse(scheduler: Scheduler) -> None:
    """Sees requests through a scheduler of which nothing else is wanted: in a plain and in a disaggregated fleet."""
    for roles in (Role.DEFAULT, Role.DEFAULT), (Role.PREFILL, Role.DECODE):
        request = Ask(id="rehearsal", prompt_tokens=64, arrived=0.0)
        view = [InstanceView(id=f"{i} {role}", role=role) for i, role in enumerate(roles)]
        choice = scheduler.choose(request, view, 0.0)
        if isinstance(choice, Send):
            scheduler.sent(request, choice, 0.0)
            scheduler.first_token(request, 0.1)
            scheduler.finished(request, 0.2, 4)
