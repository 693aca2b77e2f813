"""Export of a checkpoint to one file that runs without this project: `torch.export`, ONNX, or TorchScript.

`export_wrapper` is the exported module, `export_formats` writes it and runs the file, `verify` compares the file with
the network.
"""
