"""The judge. It sees three folders (base, adapter, merged) and nothing of how the merge was made."""
