"""Process 1: reads the inputs, holds the tokens, starts the worker, publishes and reports. It never imports torch."""
