"""The harness behind `cairn bench quality`: what a codec does to a real model's answers, and how small it really is."""
