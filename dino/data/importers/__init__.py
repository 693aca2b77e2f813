"""Annotations of other programs, converted to COCO's format: YOLO, Pascal VOC, labelme, CVAT, Label Studio, CreateML.

The readers are our own: of these formats the library supervision has two, and it needs OpenCV. `read_source.py` is the
entrance; `recognition.py` tells the formats apart and imports none of the readers.
"""
