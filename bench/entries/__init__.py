"""What each contestant runs, one program each: `python -P ENTRY base out adapter`, in the contestant's environment.

An entry imports what it needs, starts its clock, merges, and prints `{"after_imports_s": …}` as a line of its own.
"""
