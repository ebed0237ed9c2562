"""A scheduler's kernels, run before anybody waits for them: the first call of one compiles it, for seconds."""

from cairn.plan.schedule.base import Ask, InstanceView, Scheduler, Send


def rehearse(scheduler: Scheduler) -> None:
    """Sees one request through a scheduler of which nothing else is wanted."""
    request = Ask(id="rehearsal", prompt_tokens=64, arrived=0.0)
    choice = scheduler.choose(request, [InstanceView(id="a"), InstanceView(id="b")], 0.0)
    if isinstance(choice, Send):
        scheduler.sent(request, choice, 0.0)
        scheduler.first_token(request, 0.1)
        scheduler.finished(request, 0.2, 4)
