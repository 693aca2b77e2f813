"""Annotations of other programs, converted to COCO's format: YOLO, Pascal VOC, labelme, CVAT, Label Studio, CreateML.

The readers are our own: the library supervision knows neither CVAT nor Label Studio, and decodes images for their
sizes. `read_source.py` is the entrance; `recognition.py` tells the formats apart and imports none of the readers.
"""
