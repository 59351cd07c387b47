"""The run as a report: JSON, Markdown and the outputs of the action, complete wherever the run stopped."""
