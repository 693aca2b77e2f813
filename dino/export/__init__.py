"""A checkpoint as one file that runs without this project: a program of `torch.export`, ONNX, or TorchScript.

`graph` is what is exported, `formats` writes it and runs what was written, `verify` compares it with the network.
"""
