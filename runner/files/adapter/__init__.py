"""An adapter as it lies in its folder: what it is, what it was trained on, and what nobody could merge.

Only `names` needs PEFT.
"""
