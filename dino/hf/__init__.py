"""The road of transformers: DINO as a model of that library. Importing it registers the Auto classes.

Extra `hf`: pip install "dino-detectron2[hf]".
"""

try:
    import transformers
except ModuleNotFoundError as error:
    raise ImportError('dino.hf needs transformers: pip install "dino-detectron2[hf]"') from error

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 57):
    found = transformers.__version__
    raise ImportError(f'dino.hf needs transformers 4.57 or newer, not {found}: pip install -U "dino-detectron2[hf]"')

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection, AutoVideoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .configuration_dino_detr import DinoDetrConfig
from .image_processing_dino_detr import DinoDetrImageProcessor
from .modeling_dino_detr import DinoDetrForObjectDetection, DinoDetrModel, DinoDetrPreTrainedModel

__all__ = [
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrImageProcessor",
    "DinoDetrModel",
    "DinoDetrPreTrainedModel",
]

AutoConfig.register(DinoDetrConfig.model_type, DinoDetrConfig, exist_ok=True)
AutoModel.register(DinoDetrConfig, DinoDetrModel, exist_ok=True)
AutoModelForObjectDetection.register(DinoDetrConfig, DinoDetrForObjectDetection, exist_ok=True)
AutoImageProcessor.register(DinoDetrConfig, fast_image_processor_class=DinoDetrImageProcessor, exist_ok=True)
# Without it, `pipeline` works but logs as an error that it does not know the model.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault(DinoDetrConfig.model_type, DinoDetrForObjectDetection.__name__)
# A model without one. Else `pipeline` of newer versions asks whether to run the folder's code, in search of its class.
AutoVideoProcessor.register(DinoDetrConfig, None, exist_ok=True)
