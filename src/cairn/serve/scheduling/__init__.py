"""Which instance serves a request, and when: policies behind one interface. Pure: no I/O, no clock of its own."""
