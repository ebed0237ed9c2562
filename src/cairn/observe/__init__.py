"""What can be seen of Cairn: reasons, counters, logs. Stands at the bottom: everything may report, nothing is called back."""
