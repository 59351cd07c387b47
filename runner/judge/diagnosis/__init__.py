"""What kind of wrong merge it is: explains a failed verdict, with the evidence, and never changes it.

`runner.judge.diagnosis.report.diagnose` is the way in. For tensors, every hypothesis is a computation: what would the
file hold if the merge had gone wrong in this way? One that gives the bits on disk explains them. Only tensors that
failed are read again, of those at most `MAX_EXAMINED`, and of each one block of rows around the first wrong one.
"""
