"""The merge: units of the attached model, summed in float32, rounded once, written in the order of the bytes."""
