"""Mixtures in training loops that are not ours (docs/how-to/your-own-loop.md).

`loop` is for any loop and needs no torch; `pytorch` is a dataset for torch's DataLoader; `huggingface` drives
`transformers.Trainer`. Each imports what it is named after, so nothing is imported here.
"""
