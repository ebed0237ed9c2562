"""What can be seen of Cairn: reasons, counters, logs. It stands at the bottom, so that everything may report."""
